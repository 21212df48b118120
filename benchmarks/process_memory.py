"""Memory of the whole process as n grows: `launch/train.py` with LoRA on a CPU, under different allocators.

    python -m benchmarks.process_memory                              # n = 2 and 64, every allocator: half an hour
    python -m benchmarks.process_memory --numbers 2,16 --allocators glibc

benchmarks/segment_memory.py counts live tensors, which are flat in n; this is what the machine sees of them: the
largest resident set of a run of two steps with `--segment_rows 4`, imports, held-out pairs before and after, MLflow and
saving included. The model is random, of LLaDA's layout (8 layers of 256, 11.0M parameters), its rows have
up to 384 tokens.

Writes docs/benchmarks/process_memory.{json,md}.
"""

import argparse
import ctypes.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.load import load_tokenizer, save_model

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs/benchmarks/process_memory"
PAIRS, MAX_LENGTH, MAX_PROMPT = 64, 384, 124
FLAGS = ["--use_peft", "--segment_rows", "4", "--per_device_train_batch_size", "2", "--max_steps", "2"]
FLAGS += ["--max_length", str(MAX_LENGTH), "--max_prompt_length", str(MAX_PROMPT)]


def environments() -> dict[str, dict[str, str]]:
    """What to set for each allocator; jemalloc only where it is installed."""
    joined = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
    library = ctypes.util.find_library("jemalloc")
    jemalloc = {"jemalloc": {"LD_PRELOAD": library}} if library else {}
    return {"glibc": {}, "glibc, small blocks joined at once": joined} | jemalloc


def write_inputs(folder: Path) -> None:
    """A random model with the bundled tokenizer, and pairs of random characters of its alphabet."""
    tokenizer: Any = load_tokenizer(str(BUNDLED_MODEL))
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    shape = {"d_model": 256, "n_layers": 8, "n_heads": 8, "mlp_hidden_size": 768, "vocab_size": 8192}
    torch.manual_seed(0)
    save_model(LLaDAModelLM(LLaDAConfig.create(**shape, max_sequence_length=512, **ids)), tokenizer, folder / "model")
    generator = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        return "".join(generator.choice(list("0123456789+-= "), int(generator.integers(least, most))))

    lines = [{"prompt": text(20, 120), "chosen": text(40, 260), "rejected": text(40, 260)} for _ in range(PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measure(folder: Path, n: int, environment: dict[str, str]) -> dict[str, float]:
    """Largest resident set in MB and seconds of one run, imports included. SystemExit with its words where it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as out, (folder / "said").open("w+") as said:
        command = [sys.executable, ROOT / "launch/train.py", "--model_name_or_path", folder / "model", *FLAGS]
        command += ["--train_data", folder / "pairs.jsonl", "--num_mc_samples", n, "--output_dir", f"{out}/run"]
        setting = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        started = time.perf_counter()
        run = subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=setting, cwd=folder)
        _, status, used = os.wait4(run.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(f"n = {n} ended with {status}:\n{said.read()[-3000:]}")
    seconds = {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return {"n": n, "mb": round(used.ru_maxrss * 1024 / 1e6), **seconds}


def table(points: list[dict], machine: str) -> str:
    """One line an allocator; growth from its smallest n to its largest."""
    numbers = sorted({point["n"] for point in points})
    command = f"python -m benchmarks.process_memory --numbers {','.join(map(str, numbers))}"
    lines = [
        "# Memory of the whole process as n grows",
        "",
        f"Measured by `{command}` on {machine}: largest resident set of `launch/train.py`, two steps with LoRA and",
        "segments of 4 rows of up to 384 tokens, 11.0M parameters; CPU seconds in brackets.",
        "",
        f"| allocator | {' | '.join(f'n = {n}, MB' for n in numbers)} | growth |",
        f"|---|{'---|' * len(numbers)}---|",
    ]
    for name in dict.fromkeys(point["allocator"] for point in points):
        mine = sorted((point for point in points if point["allocator"] == name), key=lambda point: point["n"])
        cells = [f"{point['mb']:,} ({point['cpu_seconds']})" for point in mine]
        lines.append(f"| {name} | {' | '.join(cells)} | {mine[-1]['mb'] / mine[0]['mb'] - 1:+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    known = environments()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numbers", default="2,64", help="values of n")
    parser.add_argument("--allocators", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--output", type=Path, default=OUTPUT, help="files to write, without their ending")
    args = parser.parse_args()
    libc = " ".join(platform.libc_ver())
    machine = f"{platform.machine()} CPU, 1 thread, {libc}, torch {torch.__version__}"
    points: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for name in args.allocators:
            for n in map(int, args.numbers.split(",")):
                points.append({"allocator": name, **measure(Path(folder), n, known[name])})
                print(points[-1], flush=True)
    args.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "points": points}, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(points, machine))
    print(table(points, machine))


if __name__ == "__main__":
    main()
