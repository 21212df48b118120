"""One run, several engines and numbers of processes: the same curve. Through the public command, on gloo."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port

BIN = Path(sys.executable).parent
DS = ["--ds_config", "ds_configs/4080_offload.json"]
PLAIN_1 = [sys.executable, "launch/train.py"]
LAUNCHERS = {
    "plain, 2 processes": ([str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "launch/train.py"], [], 2),
    "ZeRO-2 offload, 1 process": ([sys.executable, "launch/train.py"], DS, 1),
    "ZeRO-2 offload, 2 processes": (
        [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py"],
        DS,
        2,
    ),
    "FSDP2, 2 processes": (
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "launch/train.py"],
        ["--engine", "fsdp2"],
        2,
    ),
}
STEPS, GLOBAL_BATCH = 3, 8


def curve(command, launcher: list[str], flags: list[str], processes: int, tiny_model, pairs_file, out: Path):
    """(loss, gradient norm) of every step, held-out margins after."""
    done = command(
        [
            *launcher,
            *flags,
            *("--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(out)),
            *("--per_device_train_batch_size", str(GLOBAL_BATCH // processes // 2), "--gradient_accumulation_steps"),
            *("2", "--max_steps", str(STEPS), "--learning_rate", "1e-3", "--warmup_steps", "0", "--beta", "0.5"),
            *("--segmentation", "checkpoint", "--segment_rows", "6", "--max_length", "128", "--tracking_uri", "none"),
            *("--max_prompt_length", "64", "--eval_fraction", "0.2", "--per_device_eval_batch_size", "2"),
        ],
        timeout=480,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    summary = json.loads((out / "summary.json").read_text())
    return steps, summary["held_out"]["rewards/margins"]["after"]["mean"]


@pytest.fixture(scope="module")
def truth(command, tiny_model, pairs_file, tmp_path_factory):
    """The single process without any library."""
    return curve(command, PLAIN_1, [], 1, tiny_model, pairs_file, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHERS)
def test_same_curve_as_one_plain_process(command, tiny_model, pairs_file, tmp_path, truth, name):
    steps, margin = curve(command, *LAUNCHERS[name], tiny_model, pairs_file, tmp_path / "run")
    expected, expected_margin = truth
    assert len(steps) == len(expected) == STEPS
    assert steps[0][0] == pytest.approx(0.69314718, abs=1e-5)
    for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-4, abs=1e-6)
        assert norm == pytest.approx(true_norm, rel=1e-3)
    assert expected[-1][0] < 0.69, "three steps must have moved the policy"
    assert margin == pytest.approx(expected_margin, rel=1e-2)


OFFLOADS = {
    "nothing": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "optimizer and weights": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (stage, offload)
        for stage in (1, 2, 3)
        for offload in OFFLOADS
        if stage == 3 or offload != "optimizer and weights"
    ],
)
def test_every_stage_and_offload_trains_as_the_plain_engine(
    command, tiny_model, pairs_file, tmp_path, truth, stage, offload, bf16
):
    """In bf16 weights and scores have eight bits: a first loss of ln 2, and then the way of fp32."""
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage, **OFFLOADS[offload]}}))
    flags = ["--ds_config", str(ds_config), "--bf16", str(bf16).lower()]
    steps, margin = curve(command, PLAIN_1, flags, 1, tiny_model, pairs_file, tmp_path / "run")
    expected, expected_margin = truth
    assert len(steps) == STEPS and steps[0][0] == pytest.approx(0.69314718, abs=1e-5)
    near = 5e-2 if bf16 else 1e-3
    for (loss, norm), (true_loss, true_norm) in zip(steps, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=near / 10) and norm == pytest.approx(true_norm, rel=near)
    assert margin == pytest.approx(expected_margin, rel=0.3 if bf16 else 1e-2)
