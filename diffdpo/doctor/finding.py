"""What one look at the machine found: a line of the doctor's screen. No torch in here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Thread

OK, WARNING, ERROR = "ok", "warning", "error"
PATIENCE = 10.0  # seconds that a look may take: a network folder that hangs must not hang the doctor


@dataclass(frozen=True)
class Finding:
    """``found`` of a thing by its ``name``; ``advice`` says what to do where ``state`` is not ok."""

    name: str
    state: str
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Finding:
    """As it should be, or not needed here."""
    return Finding(name, OK, found)


def warning(name: str, found: str, advice: str) -> Finding:
    """Some runs cannot be, or are slow."""
    return Finding(name, WARNING, found, advice)


def error(name: str, found: str, advice: str) -> Finding:
    """No run can be."""
    return Finding(name, ERROR, found, advice)


Look = Callable[[], Iterable[Finding]]


def looked(name: str, look: Look, *, patience: float = PATIENCE) -> list[Finding]:
    """What ``look`` finds; a warning by ``name`` in place of what it failed to find, or not in time."""
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(look())
        except Exception as failure:
            what = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            foreign = isinstance(failure, ImportError)
            advice = "mend that package (above, at software)" if foreign else "attach this line to a bug report"
            found.append(warning(name, f"could not be looked at ({what})", advice))

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        late = warning(name, f"no answer within {patience:g} s", "a device or network folder hangs; look at dmesg")
        return [*found, late]
    return found


def worst(findings: Iterable[Finding]) -> str:
    """The gravest state among them."""
    states: Iterator[str] = (finding.state for finding in findings)
    return max(states, key=(OK, WARNING, ERROR).index, default=OK)
