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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARGIN = 3.0  # seconds at the end, for what is written


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
    with tempfile.TemporaryDirectory(dir=args.json.absolute().parent) as folder:  # /tmp may be small, or memory
        out = Path(folder) / "part.json"
        flags = ["--part", part.name, "--json", str(out), "--device", args.device, *(["--tiny"] if args.tiny else [])]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(folder),
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(timeout=min(part.most, left))
            state = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            told, _ = process.communicate()
            state = "cut short"
        finally:  # whatever ends this process: what it began goes too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = round(time.perf_counter() - start, 1)
        found = json.loads(out.read_text()) if out.exists() else {}
    if state != "done":
        found = {"told": told[-2000:], **found}
    elif found.get("left_out"):
        state = "left out"
    return {**found, "state": state, "seconds": seconds}


def environment(folder: str) -> dict[str, str]:
    """Of a part: its files go with ``folder``, and torch's allocator is set as the commands set it."""
    sys.path.insert(0, str(ROOT))
    from diffdpo.command import set_allocator

    set_allocator()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": folder}


def all_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Every part, as far as the minutes go."""
    end = time.perf_counter() + 60 * args.minutes - MARGIN
    asked = args.parts.split(",") if args.parts else [part.name for part in PARTS]
    report: dict[str, Any] = {"platform": platform.platform(), "argv": sys.argv[1:], "parts": {}}
    for part in PARTS:
        if part.name not in asked:
            continue
        left = end - time.perf_counter()
        least = part.seconds / 10 if args.tiny else part.seconds
        if left < least:
            found = {"state": "left out", "left_out": f"{max(0, left):.0f} s left, it needs {least:.0f}", "seconds": 0}
        else:
            print(f"{part.name:<12} {part.what} ...", flush=True)
            found = run_part(part, args, left)
        report["parts"][part.name] = {"what": part.what, **found}
        write(args.json, report)
        why = found.get("left_out") or (found.get("told", "").strip().splitlines() or [""])[-1]
        summary = "; ".join(found.get("summary", ())) or why
        print(f"{part.name:<12} {found['state']}, {found['seconds']} s: {summary}", flush=True)
    return report


def write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def finds_gpu() -> bool:
    """Whether torch finds a GPU; a torch that cannot be imported is told by the parts themselves."""
    try:
        import torch
    except ImportError:
        return True
    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    """0 where nothing failed; what was left out or cut short is no failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether the script works")
    parser.add_argument("--parts", help=f"of {', '.join(part.name for part in PARTS)}; default: all")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set((args.parts or "").split(",")) - {part.name for part in PARTS} - {""}
    if unknown:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    if not args.minutes > 0:
        parser.error(f"--minutes is {args.minutes:g}; it must be above 0")
    if not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    if args.device == "cuda" and not finds_gpu():
        parser.error("torch finds no GPU here; --device cpu --tiny shows whether the script works")
    if args.part:
        from benchmarks import gpu_parts

        found = gpu_parts.PARTS[args.part](gpu_parts.Setting(args.device, args.tiny))
        write(args.json, found)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = all_parts(args)
    print(f"written to {args.json}")
    return int(any(part["state"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
