"""A run that goes on with an adapter, whose reference is that adapter as it started: the same curve on every engine."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port

BIN = Path(sys.executable).parent
PLAIN = [sys.executable, "launch/train.py"]
TWO = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port"]
ENGINES = {
    "ZeRO-2": (PLAIN, ["--ds_config", "ds_configs/zero2.json", "--bf16", "false"], 1),
    "ZeRO-3": (PLAIN, ["--ds_config", "ds_configs/zero3.json", "--bf16", "false"], 1),
    "FSDP2, 2 processes": (TWO, ["--engine", "fsdp2"], 2),
}
STEPS, GLOBAL_BATCH = 3, 8
FLAGS = [
    *("--gradient_accumulation_steps", "2", "--learning_rate", "1e-2", "--warmup_steps", "0", "--beta", "0.5"),
    *("--max_length", "128", "--max_prompt_length", "64", "--tracking_uri", "none", "--num_eval_problems", "0"),
]


def run(command, launcher: list[str], flags: list[str], processes: int, pairs_file, out: Path) -> list[float]:
    """The loss of every step."""
    if launcher is TWO:
        launcher = [*TWO, str(free_port()), "launch/train.py"]
    size = ["--per_device_train_batch_size", str(GLOBAL_BATCH // processes // 2)]
    where = ["--train_data", str(pairs_file), "--output_dir", str(out), "--max_steps", str(STEPS)]
    done = command([*launcher, *FLAGS, *size, *where, *flags], timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def started(command, tiny_model, pairs_file, tmp_path_factory) -> Path:
    """An adapter that has moved."""
    out = tmp_path_factory.mktemp("started") / "run"
    run(command, PLAIN, ["--use_peft", "--model_name_or_path", str(tiny_model)], 1, pairs_file, out)
    return out / "final"


@pytest.fixture(scope="module")
def truth(command, started, pairs_file, tmp_path_factory) -> list[float]:
    """The plain engine with a second model for the reference."""
    flags = ["--adapter_name_or_path", str(started), "--reference", "copy"]
    return run(command, PLAIN, flags, 1, pairs_file, tmp_path_factory.mktemp("copy") / "run")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ZeRO-2", "ZeRO-3")]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*SLOW, "FSDP2, 2 processes"])
def test_same_curve_as_with_a_second_model(command, started, truth, pairs_file, tmp_path, name):
    launcher, flags, processes = ENGINES[name]
    flags = [*flags, "--adapter_name_or_path", str(started)]
    losses = run(command, launcher, flags, processes, pairs_file, tmp_path / "run")
    assert losses[0] == pytest.approx(0.69314718, abs=1e-6)
    assert abs(truth[-1] - truth[0]) > 1e-3, "three steps must have moved the policy"
    assert losses == pytest.approx(truth, rel=1e-4)
    config = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(started.parent) or Path(config["base_model_name_or_path"]).is_dir()
