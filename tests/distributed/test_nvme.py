"""Runs whose state is on NVMe (here: on any disk) go on to the bit, and any engine goes on from what they saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffdpo.engine.preflight import libaio_found
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.load import load_tokenizer, save_model
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not libaio_found(), reason="DeepSpeed writes such state through libaio (libaio-dev)"),
]
BIN = Path(sys.executable).parent
RUN = (
    *("--max_steps", "6", "--save_steps", "3", "--num_generated_pairs", "64", "--max_eval_pairs", "2"),
    *("--num_eval_problems", "0", "--num_mc_samples", "2", "--tracking_uri", "none", "--learning_rate", "1e-3"),
    *("--warmup_steps", "0", "--logging_steps", "1", "--bf16", "false", "--per_device_train_batch_size", "1"),
)
WAYS = {  # groups of a MiB and more go to the disk
    "optimizer": ({}, None),
    "weights too": ({}, {"buffer_count": 12, "buffer_size": 1_500_000, "max_in_cpu": 0}),
    "reads and writes beside steps": ({"pipeline_read": True, "pipeline_write": True, "buffer_count": 16}, None),
}


def ds_config(folder: Path, way: str) -> Path:
    (folder / "disk").mkdir(exist_ok=True)
    place = {"device": "nvme", "nvme_path": str(folder / "disk"), "pin_memory": True}
    optimizer, parameters = WAYS[way]
    zero = {"stage": 3, "sub_group_size": 400_000, "offload_optimizer": place | optimizer}
    zero["offload_param"] = place | parameters if parameters else {"device": "cpu", "pin_memory": True}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder / "ds.json"


def run(out: Path, *flags: str, processes: int = 1, start: Path | None = None) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; ``start``: a run whose third step it goes on from."""
    if start is not None:
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "step-3").symlink_to(start / "checkpoints" / "step-3")
        flags = (*flags, "--resume_from_checkpoint", "latest")
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    size = ("--gradient_accumulation_steps", str(2 // processes), "--output_dir", str(out))
    command = [*launcher, str(ROOT / "launch/train.py"), *RUN, *size, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line and line["step"] > 3}


def wide(folder: Path) -> Path:
    """A model whose layers are a MiB and more each: smaller weights never leave the host."""
    tokenizer = load_tokenizer(str(BUNDLED_MODEL))
    save_model(new_model(tokenizer, width=640, layers=1, heads=4, seed=0), tokenizer, folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_to_the_bit(way, tmp_path):
    flags = ("--ds_config", str(ds_config(tmp_path, way)))
    if way == "weights too":
        flags += ("--model_name_or_path", str(wide(tmp_path / "wide")))
    whole = run(tmp_path / "whole", *flags)
    assert whole == run(tmp_path / "again", *flags, start=tmp_path / "whole")
    assert list((tmp_path / "disk").rglob("exp_avg-*.swp")), "moments were on the disk"
    assert bool(list((tmp_path / "disk").rglob("*_param.tensor.swp"))) is (way == "weights too")


def test_others_go_on_from_it_and_it_from_others(tmp_path):
    flags = ("--ds_config", str(ds_config(tmp_path, "optimizer")))
    two = run(tmp_path / "two", *flags, processes=2)
    assert two == run(tmp_path / "two-again", *flags, processes=2, start=tmp_path / "two")
    plain = run(tmp_path / "plain", "--engine", "plain")
    for name, found in (
        ("one", run(tmp_path / "one", *flags, start=tmp_path / "two")),
        ("plain from it", run(tmp_path / "from-it", "--engine", "plain", start=tmp_path / "two")),
        ("it from plain", run(tmp_path / "from-plain", *flags, start=tmp_path / "plain")),
        ("two from plain", run(tmp_path / "two-from-plain", *flags, start=tmp_path / "plain", processes=2)),
    ):
        for step, numbers in found.items():
            assert numbers == pytest.approx(plain[step], rel=3e-6), (name, step)


def test_the_best_model_is_gone_back_to_and_exported(tmp_path):
    flags = ("--ds_config", str(ds_config(tmp_path, "optimizer")), "--load_best_model_at_end", "--eval_steps", "3")
    run(tmp_path / "best", *flags, "--metric_for_best_model", "rewards/margins", "--save_total_limit", "2")
    kept = json.loads((tmp_path / "best" / "summary.json").read_text())["kept_step"]
    assert kept in (3, 6)
    of = ("--checkpoint", str(tmp_path / "best/checkpoints/step-3"), "--output", str(tmp_path / "model"))
    command = [sys.executable, str(ROOT / "launch/export.py"), *of]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
