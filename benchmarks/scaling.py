"""Strong and weak scaling on one and two processes, per engine: compute, bytes against theory, waiting; and a forecast.

    python benchmarks/scaling.py --model MODEL_FOLDER --output docs/benchmarks/scaling        # measure, then forecast
    python benchmarks/scaling.py --forecast docs/benchmarks/scaling.json                      # forecast alone

"strong": the same step on more processes; "weak": the same pairs a process; "uneven": weak, but the first of two ranks
has a quarter of the tokens: nothing may hang, and the difference must show as its waiting. Two processes on two
cores share memory bandwidth, so what weak scaling loses here is not what a network costs: bytes are the figure to
keep, and the forecast (`scaling_model.py`) is made of those.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.scaling_model import ENGINES, forecast, theory

ROOT = Path(__file__).resolve().parents[1]
PAIRS, MICRO, TOKENS, STEPS = 4, 2, 64, 3
SEGMENTS = 2  # of a micro-batch under `two_pass`: 8 rows by 4, see the worker
RUNS = {  # processes, pairs of each, uneven
    "one process": (1, PAIRS, False),
    "strong": (2, PAIRS // 2, False),
    "weak": (2, PAIRS, False),
    "uneven": (2, PAIRS, True),
}


def measure(engine: str, name: str, model: str, timeout: int) -> dict:
    """One run in processes of its own; subprocess.TimeoutExpired for one that hangs."""
    processes, pairs, uneven = RUNS[name]
    case = {"engine": engine, "model": model, "pairs": pairs, "micro": MICRO, "tokens": TOKENS, "uneven": uneven}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        worker = ["-m", "benchmarks.scaling_worker", json.dumps(case | {"steps": STEPS}), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*line, *worker], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise SystemExit(f"{engine}, {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(out.read_text())
    return row(engine, name, found)


def row(engine: str, name: str, found: dict) -> dict:
    """A line of the table: medians over the steps, of each rank."""
    ranks, size, weights = found["ranks"], found["size"], found["weights"]
    seconds = [statistics.median(step["step"] for step in rank["steps"]) for rank in ranks]
    waiting = [statistics.median(step["communication"] for step in rank["steps"]) for rank in ranks]
    sent = sum(ranks[0]["bytes"].values())
    backwards = found["case"]["pairs"] // found["case"]["micro"] * (SEGMENTS if engine == "zero3" else 1)
    return {
        "engine": engine,
        "run": name,
        "processes": size,
        "seconds": max(seconds),
        "waiting": waiting,
        "bytes": sent,
        "theory": round(theory(engine, weights, size, backwards, tied=found["tied"])),
        "kinds": ranks[0]["bytes"],
        "pairs": found["case"]["pairs"] * size,
    }


def table(rows: list[dict]) -> str:
    """As Markdown."""
    lines = ["| engine | run | processes | s a step | pairs/s | waiting of each rank, s | MB sent | theory, MB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        waits = ", ".join(f"{value:.2f}" for value in r["waiting"])
        cells = (
            r["engine"],
            r["run"],
            r["processes"],
            f"{r['seconds']:.2f}",
            f"{r['pairs'] / r['seconds']:.1f}",
            waits,
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {r['bytes'] / 1e6:.2f} | {r['theory'] / 1e6:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a small model")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--output", type=Path, help="files to write, without their ending")
    parser.add_argument("--timeout", type=int, default=400, help="seconds after which a run is said to hang")
    parser.add_argument("--forecast", type=Path, help="JSON of an earlier measurement")
    args = parser.parse_args()
    if args.forecast:
        print(forecast(json.loads(args.forecast.read_text())["rows"]))
        return
    if not args.model:
        parser.error("give --model, or --forecast")
    rows = []
    for engine in args.engines:
        for name in RUNS:
            rows.append(measure(engine, name, args.model, args.timeout))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if args.output:  # what is measured is kept, whenever it ends
                machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
                record = {"machine": machine, "tokens": TOKENS, "micro": MICRO, "rows": rows}
                args.output.with_suffix(".json").write_text(json.dumps(record, indent=1))
    text = f"{table(rows)}\n\n{forecast(rows)}\n"
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
