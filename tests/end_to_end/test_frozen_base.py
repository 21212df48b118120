"""A run on a frozen base: its checkpoints hold the adapter only, and it goes on to the bit."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

TRAIN = [sys.executable, "launch/train.py"]
MIB = 2**20
FLAGS = (
    *("--max_steps", "4", "--save_steps", "1", "--save_total_limit", "4", "--num_generated_pairs", "32"),
    *("--max_eval_pairs", "2", "--num_eval_problems", "0", "--num_mc_samples", "2", "--tracking_uri", "none"),
    *("--per_device_train_batch_size", "4", "--max_length", "128", "--max_prompt_length", "64", "--use_peft"),
)
QUANTISED = pytest.param(
    "--load_in_4bit",
    marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
)


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("base", [pytest.param(None, marks=pytest.mark.slow), QUANTISED], ids=["LoRA", "QLoRA"])
def test_an_adapter_goes_on_to_the_bit_from_a_small_checkpoint(command, tmp_path, base):
    flags = [*FLAGS, *([base] if base else [])]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = command([*TRAIN, *flags, "--output_dir", str(whole)], timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = whole / "checkpoints" / "step-2"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size < 5 * MIB, "the bundled model alone has more"
    shutil.copytree(checkpoint, resumed / "checkpoints" / "step-2")
    done = command([*TRAIN, *flags, "--output_dir", str(resumed), "--resume_from_checkpoint", "auto"], timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = list(losses(resumed))
    assert steps == [1, 2, 3, 4], "the checkpoint holds the lines of the first two, the other two were run"
    assert losses(resumed) == losses(whole)
    assert "after step 2" in done.stdout
