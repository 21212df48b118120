"""Reference scores made beforehand by two processes: killed half way, gone on with, and the run that `copy` gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYTHON = [sys.executable, "launch/train.py"]
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2", "launch/train.py"]
STEPS, PASS_STEPS = 6, 168  # 6 global steps of 8 records are trained on, three epochs of 448 scored


def flags(tiny_model, pairs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(tiny_model), "--train_data", str(pairs), "--output_dir", str(out)),
        *("--learning_rate", "1e-3", "--warmup_steps", "0", "--beta", "0.5", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--max_length", "128", "--max_prompt_length", "64", "--segment_rows"),
        *("6", "--per_device_eval_batch_size", "4", "--max_eval_pairs", "16", "--tracking_uri", "none", *more),
    ]


@pytest.fixture(scope="module")
def many_pairs(tmp_path_factory) -> Path:
    from data_pipeline.generate import generate_pairs

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in generate_pairs(500, seed=0)))
    return path


def curve(command, launcher: list[str], arguments: list[str], out: Path) -> list[dict]:
    """All numbers of every line but times and memory."""
    done = command([*launcher, *arguments], timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    vary = ("second", "memory", "wait", "time")
    return [{k: v for k, v in line.items() if not any(part in k for part in vary)} for line in lines]


def kill_half_way(arguments: list[str], cache: Path) -> set[Path]:
    """Start the pass in a group of its own, kill all of it after the second part; the parts that were there."""
    environment = dict(os.environ)
    process = subprocess.Popen([*TORCHRUN, *arguments], cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    try:
        while process.poll() is None and len(parts(cache)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return parts(cache)


def parts(cache: Path) -> set[Path]:
    return set(cache.glob("reference_scores/*/epoch-*/*.part"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_pass_goes_on_and_trains_as_a_copy_does(command, tiny_model, many_pairs, tmp_path):
    cache = tmp_path / "data_cache"
    whole_pass = ["--reference", "precomputed", "--precompute_only", "--max_steps", str(PASS_STEPS)]
    arguments = flags(tiny_model, many_pairs, tmp_path / "pass", *whole_pass)
    before = {path: path.stat().st_mtime_ns for path in kill_half_way(arguments, cache)}
    assert len(before) >= 2
    done = command([*TORCHRUN, *arguments], timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(parts(cache)) > len(before), "it must have been killed before its end for this test to mean anything"
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing that was there is made again"
    finished = parts(cache)

    steps = ["--max_steps", str(STEPS)]
    out = {mode: tmp_path / mode for mode in ("copy", "precomputed")}
    curves = [
        curve(command, TORCHRUN, flags(tiny_model, many_pairs, out[mode], *steps, "--reference", mode), out[mode])
        for mode in out
    ]
    assert curves[0] == curves[1], "to the bit, held-out figures too"
    assert curves[0][1]["loss"] == pytest.approx(0.69314718, abs=1e-5) and curves[0][-1]["step"] == STEPS
    assert parts(cache) == finished, "training scores nothing again"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_under_sharding_engines_too(command, tiny_model, many_pairs, tmp_path, engine):
    chosen = ["--engine", "fsdp2"] if engine == "fsdp2" else ["--ds_config", f"ds_configs/{engine}.json"]
    more = [*chosen, "--max_steps", "3"]
    out = {mode: tmp_path / mode for mode in ("copy", "precomputed")}
    curves = [
        curve(command, TORCHRUN, flags(tiny_model, many_pairs, out[mode], *more, "--reference", mode), out[mode])
        for mode in out
    ]
    assert curves[0] == curves[1]
    assert curves[0][1]["loss"] == pytest.approx(0.69314718, abs=1e-5)
