"""One fault at a time against a running ``launch/train.py``: how it ends, how soon, and what it leaves.

python -m tests.reliability.faults [--only WORD]
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.reliability.runs import Started, curve, flags_for, make_inputs, preload, start
from tests.support.paths import ROOT

PATIENCE = 240.0


@dataclass
class Seen:
    """How a run ended. ``seconds``: from the fault to the end of its last process."""

    codes: list[int]
    seconds: float
    said: str
    out: Path
    ended: bool

    @property
    def line(self) -> str:
        """The line a user looks for."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return lines[0] if len(lines) == 1 else f"{len(lines)} error lines"


When = Callable[[Path, Started], bool]


@dataclass(frozen=True)
class Bench:
    """Where faults are tried."""

    folder: Path
    model: Path
    data: Path

    def run(
        self,
        name: str,
        when: When,
        fault: Callable[[Started], None],
        *more: str,
        engine: str = "plain x1",
        file_limit: int | None = None,
        out: Path | None = None,
    ) -> Seen:
        """Start, wait for the moment, do harm, and see."""
        out = out or self.folder / name
        arguments = [*flags_for(engine, self.model, self.data, out), *more]
        run = start(arguments, 2 if engine.endswith("x2") else 1, self.folder / f"{name}.log", file_limit=file_limit)
        until = time.monotonic() + PATIENCE
        while not when(out, run) and not run.poll() and time.monotonic() < until:
            time.sleep(0.002)
        began = time.monotonic()
        fault(run)
        ended = run.wait(PATIENCE)
        run.kill(run.pids)
        return Seen(list(run.codes.values()), time.monotonic() - began, run.log.read_text(), out, ended)


def begun(out: Path, run: Started) -> bool:
    return (out / "config.yaml").exists()


def in_step(number: int) -> When:
    return lambda out, run: (out / "metrics.jsonl").exists() and len(curve(out)) >= number


def in_save(out: Path, run: Started) -> bool:
    return bool(list((out / "checkpoints").glob("*.partial")))


def has(name: str) -> When:
    return lambda out, run: (out / name).exists()


def term(run: Started) -> None:
    run.kill(run.pids, signal.SIGTERM)


def nothing(run: Started) -> None:
    """The fault is in the flags."""


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts, and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def freeze_second(run: Started) -> None:
    run.kill(run.pids[1:], signal.SIGSTOP)


def kill_one(number: int) -> Callable[[Started], None]:
    return lambda run: run.kill([run.pids[number]], signal.SIGKILL)


HANG = ("--hang_timeout", "15", "--stop_seconds", "8")


def stopped_in(bench: Bench, name: str, when: When, *more: str) -> tuple[Seen, bool]:
    seen = bench.run(name, when, term, *more)
    whole = not (seen.out / "final").exists() or (seen.out / "final" / "model.safetensors").exists()
    return seen, seen.codes == [3] and seen.seconds < 10 and whole and not (seen.out / "final.partial").exists()


def silent(bench: Bench, name: str, when: When, fault, code: int) -> tuple[Seen, bool]:
    with silent_server() as uri:
        seen = bench.run(name, when, fault, "--tracking_uri", uri)
    return seen, seen.codes == [code]


def full_disk(bench: Bench, policy: str) -> tuple[Seen, bool]:
    """No file may grow beyond 200 kB: the model does, the optimizer's state does not fit."""
    flags = ("--save_on_full_disk", policy)
    seen = bench.run(f"full-{policy}", begun, nothing, *flags, file_limit=200_000)
    left = [path.name for path in (seen.out / "checkpoints").glob("*")]
    if policy == "stop":
        return seen, seen.codes == [1] and "cannot be written" in seen.line and "needs about" in seen.line and not left
    return seen, seen.codes == [0] and "trains on without this checkpoint" in seen.said and not left


def second_run(bench: Bench) -> tuple[Seen, bool]:
    """A resume beside a living run."""
    out, results = bench.folder / "shared", []

    def begin_another(run: Started) -> None:
        results.append(bench.run("second", has("nowhere"), nothing, out=out))

    first = bench.run("first", in_step(2), begin_another, out=out)
    return results[0], results[0].codes == [2] and "in use by a living run" in results[0].line and first.codes == [0]


def frozen(bench: Bench) -> tuple[Seen, bool]:
    seen = bench.run("frozen", in_step(4), freeze_second, *HANG, engine="plain x2")
    return seen, seen.ended and 4 in seen.codes and "rank 1 on" in seen.line and "no life" in seen.line


def lost(bench: Bench, number: int) -> tuple[Seen, bool]:
    seen = bench.run(f"lost-{number}", in_step(4), kill_one(number), engine="plain x2")
    return seen, seen.ended and 1 in seen.codes and f"rank {number} on" in seen.line and "Traceback" not in seen.said


def scoring(out: Path, run: Started) -> bool:
    return any((out.parent / "data_cache").glob("reference_scores/*"))


def finished_before(bench: Bench) -> tuple[Seen, bool]:
    """The constant command on a run that has finished."""
    out = bench.folder / "done"
    first = bench.run("done", begun, nothing, "--max_steps", "2", out=out)
    before = (out / "metrics.jsonl").read_bytes()
    again = bench.run("done-again", has("nowhere"), nothing, "--max_steps", "2", out=out)
    same = (out / "metrics.jsonl").read_bytes() == before
    return again, first.codes == [0] and again.codes == [0] and same and "is finished" in again.said


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--master_port", "0")


def launcher_killed(bench: Bench, name: str, line: tuple[str, ...], engine: str) -> tuple[Seen, bool]:
    """kill -9 of a launcher: its ranks stop by themselves, and one of them says so."""
    out, log = bench.folder / name, bench.folder / f"{name}.log"
    flags = [*flags_for(engine, bench.model, bench.data, out), "--max_steps", "5000"]
    launcher = [sys.executable, *line]
    with log.open("w") as file:
        process = subprocess.Popen([*launcher, "launch/train.py", *flags], cwd=ROOT, stdout=file, stderr=file)
        until = time.monotonic() + PATIENCE
        while not in_step(3)(out, Started([], log)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        seconds = time.monotonic() - began
    for rank in alive:
        rank.kill()
    seen = Seen([], seconds, log.read_text(), out, not alive)
    saved = list((out / "checkpoints").glob("step-*"))
    told = seen.said.count("has gone: stopping")
    return seen, bool(ranks) and not alive and seconds < 15 and bool(saved) and told == 1


CASES: dict[str, Callable[[Bench], tuple[Seen, bool]]] = {
    "SIGTERM before the first step": lambda b: stopped_in(b, "before", begun),
    "SIGTERM in a step": lambda b: stopped_in(b, "step", in_step(3)),
    "SIGTERM in a save": lambda b: stopped_in(b, "save", in_save),
    "SIGTERM in an evaluation between steps": lambda b: stopped_in(
        b, "evaluation", in_step(2), "--eval_steps", "1", "--max_eval_pairs", "16"
    ),
    "SIGTERM while final/ is written": lambda b: stopped_in(b, "final", has("final.partial")),
    "SIGTERM in the last evaluation": lambda b: stopped_in(b, "after", has("final")),
    "SIGTERM while reference scores are made": lambda b: stopped_in(
        b, "scores", scoring, "--reference", "precomputed", "--num_mc_samples", "64"
    ),
    "SIGTERM, MLflow accepts and never answers": lambda b: silent(b, "silent-term", in_step(3), term, 3),
    "end, MLflow accepts and never answers": lambda b: silent(b, "silent-end", has("plots/curves.png"), nothing, 0),
    "full disk, stop": lambda b: full_disk(b, "stop"),
    "full disk, continue": lambda b: full_disk(b, "continue"),
    "auto on a finished run": finished_before,
    "kill -9 of torchrun": lambda b: launcher_killed(b, "torchrun", TORCHRUN, "plain x2"),
    "kill -9 of deepspeed": lambda b: launcher_killed(b, "deepspeed", DEEPSPEED, "ZeRO-2 offload"),
    "a second run in the folder": second_run,
    "a frozen rank (--hang_timeout 15)": frozen,
    "a killed rank 1": lambda b: lost(b, 1),
    "a killed rank 0": lambda b: lost(b, 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their name")
    given, failed = parser.parse_args(), 0
    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        bench = Bench(Path(name), *make_inputs(Path(name)))
        print("| fault | exit codes | seconds to the end | as promised | line |\n|---|---|---|---|---|", flush=True)
        for case, work in CASES.items():
            if given.only in case:
                seen, good = work(bench)
                failed += not good
                line = seen.line if any(code not in (0, 3) for code in seen.codes) else ""
                cells = (case, seen.codes, f"{seen.seconds:.1f}", "yes" if good else "NO", line.replace(name, "..."))
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                if not good and os.environ.get("VERBOSE"):
                    print(seen.said[-3000:])
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
