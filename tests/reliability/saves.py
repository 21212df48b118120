"""How long a step waits for a checkpoint that is written beside the steps, against one it waits for, engine by engine.

    python -m tests.reliability.saves --engines "plain x1,ZeRO-3 x2"

Every other checkpoint of a run is waited for. The first of each kind, which takes memory from the system, is left out.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from diffdpo.training.manifest import fault_of
from diffdpo.training.saver import Saver
from tests.reliability.damages import WORLD
from tests.reliability.runs import ENGINES, flags_for, make_inputs, preload, start

MARK = "save-seconds"
SAVES = 8


def note_seconds() -> None:
    """Every save from here on, of forked runs too, says how long it held the step."""
    save = Saver.save

    def timed(self: Saver, step: int, state: dict, *, wait: bool) -> None:
        self.settle()  # the one before is not this one's
        beside, began = step % 2 == 0, time.monotonic()
        save(self, step, state, wait=not beside)
        waits = "beside" if beside and self.step is not None else "waited for"
        if self.engine.world.is_main:
            print(f"\n{MARK} {waits}: {time.monotonic() - began:.4f}", flush=True)

    Saver.save = timed  # type: ignore[method-assign]


def seconds_of(engine: str, folder: Path, inputs: tuple[Path, Path]) -> tuple[dict[str, list[float]], int, bool]:
    """({how: seconds of each save}, bytes of a checkpoint, whether the last one, written beside, is sound)."""
    out, log = folder / "run", folder / "run.log"
    more = ["--save_steps", "1", "--max_steps", str(SAVES + 1), "--save_total_limit", "1"]
    run = start([*flags_for(engine, *inputs, out), *more], ENGINES[engine][0], log)
    if not run.wait(500) or any(run.codes.values()):
        run.kill(run.pids)
        raise RuntimeError(f"{engine}: {run.codes}; {log.read_text()[-2000:]}")
    found: dict[str, list[float]] = {"beside": [], "waited for": []}
    for line in log.read_text().splitlines():
        if line.startswith(MARK):
            how, _, seconds = line.removeprefix(MARK).strip().rpartition(": ")
            found[how].append(float(seconds))
    last = out / "checkpoints" / f"step-{SAVES}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    return found, size, fault_of(last, WORLD) is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args()
    preload()
    note_seconds()
    print("| engine | a checkpoint | the step waits for all of it | beside the steps | share | sound |")
    print("|---|---|---|---|---|---|")
    for engine in given.engines.split(","):
        with tempfile.TemporaryDirectory(prefix="saves-") as name:
            inputs = make_inputs(Path(name), width=given.width, layers=4)
            found, size, sound = seconds_of(engine, Path(name), inputs)
        beside, whole = (statistics.median(found[how][1:]) for how in ("beside", "waited for"))
        cells = (engine, f"{size / 1e6:.0f} MB", f"{whole:.2f} s", f"{beside:.2f} s", f"{beside / whole:.0%}", sound)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
