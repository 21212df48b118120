"""How many rows fit in a forward: found by running rows of the greatest length, twice as many each time.

A size is tried only when a straight line through the last two says that it will fit, so the search itself does not run
out of memory; processes agree on every number, so they try the same sizes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffdpo.gpus import is_gpu, kind_of
from diffdpo.memory.peak import GIB

TOO_MUCH = 2**62  # bytes: the peak of what ran out of memory


@dataclass(frozen=True)
class Fit:
    """``rows`` of the greatest length fit in ``budget`` bytes (of 1 see ``fits``). ``tried``: (rows, peak bytes)."""

    rows: int
    budget: int
    tried: tuple[tuple[int, int], ...]

    @property
    def fits(self) -> bool:
        """Whether a row fits at all."""
        return dict(self.tried)[self.rows] <= self.budget

    def describe(self, max_length: int) -> str:
        """What was found, in words for the user."""
        peak = dict(self.tried)[self.rows] / GIB
        if not self.fits:
            found = "it ran out of memory" if self.tried[0][1] == TOO_MUCH else f"it takes {peak:.2f} GiB"
            return (
                f"WARNING: not even one row of {max_length} tokens fits in {self.budget / GIB:.2f} GiB, {found}; give "
                "a larger --max_memory, a smaller --max_length, or --gradient_checkpointing true"
            )
        return (
            f"{self.rows} rows of {max_length} tokens take {peak:.2f} of {self.budget / GIB:.2f} GiB "
            f"(measured: {', '.join(str(rows) for rows, _ in self.tried)} rows)"
        )


def largest_fit(measure: Callable[[int], int], *, budget: int, most: int) -> Fit:
    """The largest of 1, 2, 4, ... ``most`` rows whose peak stays within ``budget``; 1 where even that does not.

    ``measure(rows)``: peak bytes, the same on every process.
    """
    tried = [(1, measure(1))]
    while tried[-1][0] < most and tried[-1][1] <= budget:
        rows = min(2 * tried[-1][0], most)
        (x, below), (y, last) = tried[-2:] if len(tried) > 1 else ((0, tried[0][1] // 2), tried[0])
        if last + max(0, last - below) / (y - x) * (rows - y) > budget:
            break
        tried.append((rows, measure(rows)))
    fitting = [rows for rows, peak in tried if peak <= budget] or [1]
    return Fit(fitting[-1], budget, tuple(tried))


def memory_budget(fraction: float, device: torch.device, *, reserve: int) -> int:
    """Bytes this process may use: ``fraction`` of the device's memory, less ``reserve`` for what comes later.

    On a CPU the memory that is available now (with what this process holds), shared with the host's other processes.
    """
    if is_gpu(device):
        return int(fraction * kind_of(device).total_memory(device)) - reserve
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    own = psutil.Process().memory_info().rss
    return int(fraction * (psutil.virtual_memory().available / sharers + own)) - reserve


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes in use on the device while ``work`` runs: by everyone on a GPU, by this process on a CPU."""
    if is_gpu(device):
        kind = kind_of(device)
        kind.reset_peaks(device)
        others = kind.held_by_others(device)
        work()
        return others + kind.peak_reserved(device)
    mark = Path("/proc/self/clear_refs")  # Linux: 5 sets the high-water mark back to what is resident now
    if mark.exists():
        mark.write_text("5")
    work()
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
