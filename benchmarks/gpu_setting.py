"""Where the parts of benchmarks/gpu_evidence.py run: the device, and the packages that can be used."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache

import torch

GIB = 2**30
CARD = 16 * GIB


@dataclass(frozen=True)
class Setting:
    """Where the parts run; ``tiny``: on shapes that show whether they work."""

    kind: str
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    def of_16_gb(self) -> None:
        """From here on this process has no more of the GPU than such a card, of which the context takes a GiB."""
        if self.kind == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - GIB) / total))


@cache
def fault_of(package: str) -> str | None:
    """Why a package cannot be used here; None where it can. That it is found says little: its libraries may be missing
    or of another CUDA, which only importing it tells.

    One that cannot be imported looks from here on as if it were not installed. peft asks whether bitsandbytes is there,
    and would import it for adapters on weights that have nothing to do with it.
    """
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as fault:  # whatever a library of the wrong kind raises
        sys.modules[package] = None  # type: ignore[assignment]
        return f"{package} cannot be imported: {in_a_line(fault)}"
    return None


def in_a_line(fault: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    return ": ".join([type(fault).__name__, *[line for line in str(fault).splitlines() if line.strip()][:1]])
