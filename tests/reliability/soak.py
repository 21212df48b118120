"""One long run under random faults of all kinds, resumed by the constant command; its curve must be that of the run
that nobody disturbed, but for lines that were torn off the journal and told of in it.

    python -m tests.reliability.soak --minutes 120

Faults: kill -9, SIGTERM, a server that never answers (with SIGTERM), a disk that is full for a while, a bit flipped in
the newest checkpoint, a torn journal.
"""

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from diffdpo.tracking.journal import read_journal, told_gaps
from diffdpo.training.checkpoint import list_checkpoints
from tests.reliability.damages import one_bit
from tests.reliability.faults import silent_server
from tests.reliability.kills import Tally
from tests.reliability.runs import Started, curve, flags_for, held_out, lines, make_inputs, preload, start, weights

PATIENCE = 600.0
FAULTS = ("kill -9", "SIGTERM", "SIGTERM, silent server", "full disk", "bit in the newest checkpoint", "torn journal")


def after_more_steps(run: Started, out: Path, steps: int) -> None:
    """Until the run has taken so many more steps, or has ended."""
    until = time.monotonic() + PATIENCE
    before = None
    while not run.poll() and time.monotonic() < until:
        if now := lines(out):
            before = now if before is None else min(before, now)
            if now >= before + steps:
                return
        time.sleep(0.02)


def disturb(fault: str, arguments: list[str], out: Path, log: Path, chance: random.Random) -> list[int]:
    """Start the run, let it go on for a while, do harm; its exit codes."""
    steps = chance.randrange(3, 12)
    if fault == "SIGTERM, silent server":
        with silent_server() as uri:
            run = start([*arguments, "--tracking_uri", uri], 1, log)
            after_more_steps(run, out, steps)
            run.kill(run.pids, signal.SIGTERM)
            run.wait(60)
    else:
        run = start(arguments, 1, log, file_limit=200_000 if fault == "full disk" else None)
        after_more_steps(run, out, steps)
        run.kill(run.pids, signal.SIGTERM if fault in ("SIGTERM", "full disk") else signal.SIGKILL)
        run.wait(60)
    if fault.startswith("bit") and len(known := list_checkpoints(out)) > 1:
        files = sorted(path for path in known[-1].rglob("*") if path.is_file())
        file = chance.choice(files)
        one_bit(file, file, chance)
    if fault == "torn journal":
        journal = out / "metrics.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
    return list(run.codes.values())


def compare(whole: Path, out: Path, tally: Tally) -> set[int]:
    """Steps without a line. What differs, and what is gone and was not told, is noted by name."""
    right, there = {line[0]: line for line in curve(whole)}, {line[0]: line for line in curve(out)}
    gone = right.keys() - there.keys()
    wrong = sorted(step for step, line in there.items() if line != right.get(step))
    if wrong:
        tally.differing.append(f"lines of steps {wrong[:9]}")
    if untold := sorted(gone - told_gaps(read_journal(out / "metrics.jsonl"))):
        tally.differing.append(f"lines of steps {untold[:9]} are gone and nothing is said")
    tally.differing += [what.__name__ for what in (weights, held_out) if what(whole) != what(out)]
    return set(gone)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    given, counts, gone = parser.parse_args(), Counter(), set[int]()
    preload()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, chance = given.folder or Path(name), random.Random(given.seed)
        folder.mkdir(parents=True, exist_ok=True)
        inputs, tally = make_inputs(folder), Tally()
        length = ["--max_steps", str(given.steps)]
        whole, out = folder / "whole", folder / "disturbed"
        undisturbed = start([*flags_for("plain x1", *inputs, whole), *length], 1, folder / "whole.log")
        arguments, until = [*flags_for("plain x1", *inputs, out), *length], time.monotonic() + 60 * given.minutes
        while time.monotonic() < until and not (out / "summary.json").exists():
            fault = chance.choice(FAULTS)
            counts[fault] += 1
            # a log of its own: a full disk is a limit on the size of any file, and one log of all would be above it
            log = folder / f"disturbed-{sum(counts.values())}.log"
            codes = disturb(fault, arguments, out, log, chance)
            print(f"{fault}: exit codes {codes}, {lines(out)} lines")
        last = start(arguments, 1, folder / "last.log")
        ended = last.wait(60 * given.minutes + PATIENCE) and undisturbed.wait(60 * given.minutes + PATIENCE)
        if ended and not any([*last.codes.values(), *undisturbed.codes.values()]):
            gone = compare(whole, out, tally)
        else:
            tally.differing.append(f"did not finish: {last.codes} {undisturbed.codes}")
        print("\n| fault | times |\n|---|---|")
        print("\n".join(f"| {fault} | {counts[fault]} |" for fault in FAULTS))
        print(f"\n{given.steps} steps, {len(gone)} of whose lines were torn off")
        print(f"what differs: {tally.differing or 'nothing'}")
        return len(tally.differing)


if __name__ == "__main__":
    raise SystemExit(main())
