"""Does the device compute what it should? The bundled model takes some steps on it, in every way that a run may go, and
its scores, gradients and losses are compared with float64 on the host."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from diffdpo.doctor.cases import CASES, Case
from diffdpo.doctor.measured import Measured, measure
from diffdpo.doctor.pairs_of_models import two_models
from diffdpo.memory.exhausted import first_line

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
COLUMNS = ("score", "gradient", "loss")


@dataclass(frozen=True)
class Compared:
    """``off``: how far score, gradient and loss were off, and ``allowed``; ``note``: why it was skipped or failed."""

    case: str
    state: str
    off: dict[str, float]
    allowed: dict[str, float]
    seconds: float
    note: str = ""


def self_test(device: torch.device, cases: Sequence[Case] = CASES) -> Iterator[Compared]:
    """Each case as it ends. One that raises has failed; one that cannot be tried here is skipped."""
    exact: dict[tuple, Measured] = {}
    for case in cases:
        start, allowed = time.perf_counter(), asdict(case.tolerates)
        if obstacle := case.obstacle(device):
            yield Compared(case.name, SKIPPED, {}, allowed, 0.0, obstacle)
            continue
        try:
            off, note = _off(case, device, exact), ""
        except Exception as failure:  # whatever a device, driver or library may raise is a result
            off, note = {}, f"{type(failure).__name__}: {first_line(failure)}"
        good = bool(off) and all(off[name] <= allowed[name] for name in COLUMNS)  # NaN is not
        seconds = time.perf_counter() - start
        yield Compared(case.name, PASSED if good else FAILED, off, allowed, round(seconds, 2), note)


def _off(case: Case, device: torch.device, known: dict[tuple, Measured]) -> dict[str, float]:
    """``known``: what float64 gave for the same numbers before."""
    models, numbers = two_models(case, device), (case.dtype, case.nf4, case.blocks)
    if numbers not in known:
        known[numbers] = measure(models.exact, models.batch, torch.device("cpu"), strategy="none")
    return distance(measure(models.tried, models.batch, device, strategy=case.strategy), known[numbers])


def distance(tried: Measured, exact: Measured) -> dict[str, float]:
    """The largest difference of a score in nats a token and of a loss; the gradients' relative to the exact one's norm.

    ValueError where other parameters have a gradient.
    """
    if tried.gradient.keys() != exact.gradient.keys():
        odd = sorted(tried.gradient.keys() ^ exact.gradient.keys())
        raise ValueError(f"{len(odd)} parameters have a gradient on one side only, first {odd[0]}")
    ours, theirs = (torch.cat([m.gradient[name].flatten() for name in sorted(exact.gradient)]) for m in (tried, exact))
    losses = [abs(a - b) for a, b in zip(tried.losses, exact.losses, strict=True)]
    return {
        "score": float((tried.score_token_A - exact.score_token_A).abs().max()),
        "gradient": float((ours - theirs).norm() / theirs.norm()),
        "loss": float(torch.tensor(losses, dtype=torch.float64).max()),  # which keeps a NaN, as max() may not
    }


def run_self_test(device: torch.device, say: Callable[[str], None]) -> list[Compared]:
    """All cases, a line of a table each."""
    say(f"self-test on {device}: off from float64 on the host / allowed (score: nats a token; gradient: relative)")
    say(f"  {'':<8}{'case':<34}" + "".join(f"{name:>20}" for name in COLUMNS) + f"{'s':>7}")
    found = []
    for line in self_test(device):
        found.append(line)
        say(_row(line))
    return found


def _row(line: Compared) -> str:
    head = f"  {line.state:<8}{line.case:<34}"
    if not line.off:
        return f"{head} {line.note}"
    cells = (f"{line.off[name]:.1e} / {line.allowed[name]:.0e}" for name in COLUMNS)
    return head + "".join(f"{cell:>20}" for cell in cells) + f"{line.seconds:>7.1f}"
