"""What a GPU does with this package, in the minutes there are: numbers, memory against plan, speed against other ways.

    python benchmarks/gpu_evidence.py --minutes 8 --json gpu.json
    python benchmarks/gpu_evidence.py --minutes 4 --json cpu.json --device cpu --tiny     # the same without a GPU

Parts run in the order of their value, each in a process of its own: one that runs out of memory, hangs or brings the
driver down takes no other with it. One that the time does not suffice for is left out, and the file says so. It is
written after every part. A 16 GB card is had on a larger one by ``torch.cuda.set_per_process_memory_fraction``. Weights
are random: memory and time do not depend on them.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
MARGIN = 3.0  # seconds at the end, for what is written
ROOM = 2**18  # bytes, more than a report has


@dataclass(frozen=True)
class Part:
    """``seconds``: the least that it makes sense with; ``most``: what it may take."""

    name: str
    what: str
    seconds: float
    most: float


PARTS = (
    Part("machine", "what the machine has and lacks (diffdpo doctor)", 5, 60),
    Part("self_test", "scores, gradients and losses against float64 on the host", 40, 150),
    Part("qlora", "LLaDA-8B, NF4 and LoRA, n = 8, 1024 tokens, 16 GiB: planned and measured memory, a step", 60, 180),
    Part("throughput", "pairs/s and utilisation against the plain way and layer checkpointing", 40, 150),
    Part("head", "log p(target) without the logits matrix, against with it", 10, 40),
    Part("attention", "rows of unequal lengths: all at once, row by row, padded", 10, 40),
    Part("compiled", "the same steps under torch.compile, all three ways", 90, 240),
    Part(
        "full3b",
        "3B, all parameters, ZeRO-2 with the optimizer on the host, 16 GiB: memory planned and measured",
        120,
        300,
    ),
)


def run_part(part: Part, args: argparse.Namespace, left: float) -> dict[str, Any]:
    """What a process of its own found, or why there is nothing."""
    from diffdpo.children import die_with_parent

    flags = ["--part", part.name, "--json", str(args.json), "--device", args.device, *(["--tiny"] if args.tiny else [])]
    start, late = time.perf_counter(), False
    with tempfile.TemporaryDirectory(dir=args.json.absolute().parent) as folder:  # /tmp may be small, or memory
        process = subprocess.Popen(
            [sys.executable, __file__, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment(folder),
            start_new_session=True,  # so that what the part itself starts can be ended with it
            preexec_fn=die_with_parent,  # kill -9 of this process would leave a part with the GPU
        )
        try:
            answer, told = process.communicate(timeout=min(part.most, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            (answer, told), late = process.communicate(), True
        finally:  # whatever ends this process: what it began goes too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = judged(process.returncode, answer, told, late=late)
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def judged(code: int, answer: str, told: str, *, late: bool) -> dict[str, Any]:
    """What a part has answered with its state; where that is not `done`, the end of what it said on the screen too."""
    try:
        found = json.loads(answer)
    except ValueError:  # it did not come to its answer
        found, told = {}, answer + told
    if code < 0 and not late:
        found["error"] = f"ended by signal {-code} ({signal.strsignal(-code)})"
    state = "cut short" if late else "failed" if code or "error" in found else "done"
    if state != "done":
        found["told"] = told[-2000:]
    elif found.get("left_out"):
        state = "left out"
    return {**found, "state": state}


def environment(folder: str) -> dict[str, str]:
    """Of a part: its files go with ``folder``, and torch's allocator is set as the commands set it."""
    from diffdpo.command import set_allocator

    set_allocator()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": folder}


def all_parts(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fill the report with every part, as far as the minutes go, and keep it after each."""
    end = time.perf_counter() + 60 * args.minutes - MARGIN
    asked = args.parts.split(",") if args.parts else [part.name for part in PARTS]
    for part in PARTS:
        if part.name not in asked:
            continue
        left = end - time.perf_counter()
        least = part.seconds / 10 if args.tiny else part.seconds
        if left < least:
            found = {"state": "left out", "left_out": f"{max(0, left):.0f} s left, it needs {least:.0f}", "seconds": 0}
        else:
            print(f"{part.name:<12} {part.what} ...", flush=True)
            try:
                found = run_part(part, args, left)
            except OSError as fault:  # no process to be had, or no folder
                found = {"state": "failed", "error": f"cannot be started: {fault.strerror}", "seconds": 0}
        report["parts"][part.name] = {"what": part.what, **found}
        write(args.json, report)  # where that fails: again after the next, and at the end
        print(f"{part.name:<12} {found['state']}, {found['seconds']} s: {in_words(found)}", flush=True)


def in_words(found: dict[str, Any]) -> str:
    """What a part found, or why it found nothing."""
    last = (found.get("told", "").strip().splitlines() or [""])[-1]
    return "; ".join(found.get("summary", ())) or found.get("left_out") or found.get("error") or last


def write(path: Path, report: dict[str, Any]) -> OSError | None:
    """Whole or not at all. What hindered it is handed back: the parts go on, and the disk may have room later."""
    partial = partial_of(path)
    try:
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(path)
    except OSError as fault:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return fault
    return None


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def fault_of_place(path: Path) -> str | None:
    """Why a file cannot be written there; None where it can. Tried: later, a GPU's minutes would be lost with it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or name another"
    if path.exists() and not path.is_file():
        return "is a folder or a device; name a file"
    try:
        partial_of(path).write_bytes(bytes(ROOM))
        partial_of(path).unlink()
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as fault:
        with suppress(OSError):
            partial_of(path).unlink(missing_ok=True)
        return f"{folder} cannot be written ({fault.strerror}); name a file elsewhere"
    return None


class Ended(BaseException):
    """A signal has asked this process to end."""

    def __init__(self, number: int):
        self.number = number


@contextmanager
def told_of_signals() -> Iterator[None]:
    """Within, Ended by Ctrl-C, by a scheduler and by a line that hangs up: only an exception lets `run_part` take its
    process along. What nohup has set to be ignored stays so."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)  # a second one would cut the clearing up short
        raise Ended(number)

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = {kind: signal.getsignal(kind) for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN}
    for kind in heard:
        signal.signal(kind, end)
    try:
        yield
    finally:
        for kind, before in heard.items():
            signal.signal(kind, before)


def finds_gpu() -> bool:
    """Whether torch finds a GPU; a torch that cannot be imported is told by the parts themselves."""
    try:
        import torch
    except ImportError:
        return True
    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    """0 where nothing failed (what was left out or cut short is no failure), 1 where a part did, 2 where the arguments
    are wrong or the file could not be written, 128 and a signal's number where that ended it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether the script works")
    parser.add_argument("--parts", help=f"of {', '.join(part.name for part in PARTS)}; default: all")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    unknown = set((args.parts or "").split(",")) - {part.name for part in PARTS} - {""}
    if unknown:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    if not args.minutes > 0:
        parser.error(f"--minutes is {args.minutes:g}; it must be above 0")
    if args.part:
        return answer_part(args)
    report: dict[str, Any] = {"platform": platform.platform(), "argv": sys.argv[1:], "parts": {}}
    try:
        with told_of_signals():
            if fault := fault_of_place(args.json):
                parser.error(f"--json {args.json}: {fault}")
            if args.device == "cuda" and not finds_gpu():
                parser.error("torch finds no GPU here; --device cpu --tiny shows whether the script works")
            all_parts(args, report)
    except Ended as ended:
        with suppress(OSError):  # the terminal may be what has gone
            keep(args.json, report)
            print(f"ended by {signal.Signals(ended.number).name}", file=sys.stderr, flush=True)
        return 128 + ended.number
    failed = any(part["state"] == "failed" for part in report["parts"].values())
    return 2 if not keep(args.json, report) else int(failed)


def keep(path: Path, report: dict[str, Any]) -> bool:
    """Whether what was measured is in the file; where it cannot be, it is printed, to be kept by hand."""
    if not report["parts"]:
        return True
    if fault := write(path, report):
        print(json.dumps(report), flush=True)
        print(f"error: {path} cannot be written ({fault.strerror}); what was measured is above", file=sys.stderr)
        return False
    print(f"written to {path}", flush=True)
    return True


def answer_part(args: argparse.Namespace) -> int:
    """In the process of a part: its answer goes to who started it through the pipe that was stdout, which no full disk
    can keep it from; what libraries print goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    from benchmarks import gpu_parts

    found = gpu_parts.found_by(args.part, gpu_parts.Setting(args.device, args.tiny))
    with open(answer, "w") as out:
        json.dump(found, out)
    return int("error" in found)


if __name__ == "__main__":
    sys.exit(main())
