"""Kill -9 at random moments, half of them inside saves; resume by the constant command; compare with the run that
nobody disturbed: curve, weights and held-out numbers to the bit, and no process left behind.

    python -m tests.reliability.kills --kills 100 --engines "plain x1,plain x2,ZeRO-2 offload,ZeRO-3 x2"
"""

import argparse
import contextlib
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.reliability.runs import (
    ENGINES,
    Started,
    curve,
    flags_for,
    held_out,
    make_inputs,
    preload,
    start,
    weights,
)

KILLS_A_RUN = 5
PATIENCE = 240.0  # seconds for a run of a minute: the machine may be loaded


@dataclass
class Tally:
    """What came of an engine's kills."""

    kills: int = 0
    in_saves: int = 0
    finished: int = 0  # before they could be killed
    told: int = 0  # outlived a companion by a minute, and ended when told
    orphans: int = 0  # lived on even then
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaign(engine: str, kills: int, folder: Path, inputs: tuple[Path, Path], seed: int) -> Tally:
    """So many kills of one engine."""
    tally, chance, began = Tally(), random.Random(f"{seed} {engine}"), time.monotonic()
    whole = folder / "whole"
    processes = ENGINES[engine][0]
    first = start(flags_for(engine, *inputs, whole), processes, folder / "whole.log")
    if not first.wait(PATIENCE) or any(first.codes.values()):
        raise RuntimeError(f"{engine}: the undisturbed run did not end well: {first.codes}; see {first.log}")
    while tally.kills < kills:
        out = folder / f"run-{tally.runs}"
        arguments = flags_for(engine, *inputs, out)
        log = folder / f"run-{tally.runs}.log"
        for number in range(min(KILLS_A_RUN, kills - tally.kills)):
            run = start(arguments, processes, log)
            _kill_somewhere(run, out, tally, chance, in_save=number % 2 == 0)
        last = start(arguments, processes, log)
        if not last.wait(PATIENCE) or any(last.codes.values()):
            last.kill(last.pids)
            tally.differing.append(f"{log}: did not finish ({last.codes})")
        else:
            compare(whole, out, tally)
        tally.runs += 1
    tally.seconds = time.monotonic() - began
    return tally


def compare(whole: Path, out: Path, tally: Tally) -> None:
    """What differs is noted by name."""
    for what in (curve, weights, held_out):
        if what(whole) != what(out):
            tally.differing.append(f"{out}: {what.__name__}")


def _kill_somewhere(run: Started, out: Path, tally: Tally, chance: random.Random, *, in_save: bool) -> None:
    """One rank or all of them: in the next save but some, some time after a step, or at any time after the start."""
    left = _partials(out)  # by the run that was killed before
    if in_save:
        moment = _in_a_save(out, left, chance.randrange(0, 3))
    elif chance.random() < 0.5:
        moment = _after_a_step(out, chance.randrange(0, 6))
    else:
        moment = _after_seconds(4 * chance.random())
    until = time.monotonic() + PATIENCE
    while not run.poll() and time.monotonic() < until and not moment():
        time.sleep(0.0005)
    time.sleep(chance.random() * (0.05 if in_save else 0.1))
    if run.poll():
        tally.finished += 1
        return
    inside = bool(_partials(out) - left)
    run.kill(run.pids if chance.random() < 0.5 else [chance.choice(run.pids)])
    tally.kills += 1
    tally.in_saves += inside
    if not run.wait(60.0):  # the others end by themselves, but for one that waits for its companion to start
        tally.told += 1
        print(f"  alive after 60 s: {out}, of {run.pids} ended {run.codes}", flush=True)
        run.kill(run.pids, signal.SIGTERM)  # as a launcher does at once
    if not run.wait(15.0):
        tally.orphans += 1
        run.kill(run.pids)
        run.wait(10.0)


def _partials(out: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or were when their run was killed: two of a name are not the same."""
    found = set()
    for path in (out / "checkpoints").glob("*.partial"):
        with contextlib.suppress(OSError):
            found.add((path.name, path.stat().st_ino))
    return found


def _in_a_save(out: Path, left: set, some: int) -> Callable[[], bool]:
    seen: set = set()

    def saving() -> bool:
        now = _partials(out) - left
        seen.update(now)
        return bool(now) and len(seen) > some

    return saving


def _after_a_step(out: Path, wanted: int) -> Callable[[], bool]:
    steps = len(curve(out)) if (out / "metrics.jsonl").exists() else 0
    return lambda: (out / "metrics.jsonl").exists() and len(curve(out)) > min(steps, 10) + wanted


def _after_seconds(wanted: float) -> Callable[[], bool]:
    began = time.monotonic()

    def seconds() -> bool:
        return time.monotonic() > began + wanted

    return seconds


def table(tallies: dict[str, Tally]) -> str:
    """For docs/reliability.md."""
    lines = [
        "| engine | kills | inside a save | runs | curve, weights, held-out numbers that differ | had to be told "
        "| orphans | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, t in tallies.items():
        cells = (engine, t.kills, t.in_saves, t.runs, len(t.differing), t.told, t.orphans, f"{t.seconds / 60:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    preload()
    inputs, tallies = make_inputs(folder), {}
    for engine in given.engines.split(","):
        place = folder / engine.replace(" ", "_")
        place.mkdir()
        tallies[engine] = campaign(engine, given.kills, place, inputs, given.seed)
        print(table(tallies), flush=True)
        for text in tallies[engine].differing:
            print("  differs:", text, flush=True)


if __name__ == "__main__":
    main()
