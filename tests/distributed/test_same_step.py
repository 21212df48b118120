"""Two processes with a micro-batch found by measuring take the step of the micro-batch given."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2", "launch/train.py"]
SHORT = ["--max_steps", "3", "--learning_rate", "5e-3", "--warmup_steps", "0", "--max_length", "128"]
SHORT += ["--max_prompt_length", "64", "--max_eval_pairs", "8", "--tracking_uri", "none", "--eval_task", "none"]


def curve(command, start: list[str], flags: list[str], out: Path) -> list[float]:
    done = command([*start, *flags, *SHORT, "--output_dir", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "grad_norm" in line for name in ("loss", "grad_norm")]


def test_a_micro_batch_found_by_measuring(command, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file)]
    given = [*flags, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    as_given = curve(command, TORCHRUN, given, tmp_path / "given")
    measured = curve(command, TORCHRUN, [*given, "--max_memory", "0.3"], tmp_path / "measured")
    assert measured == pytest.approx(as_given, rel=1e-4) and abs(as_given[2] - as_given[0]) > 1e-3
    assert "per_device_train_batch_size: 8" in (tmp_path / "measured" / "config.yaml").read_text()
