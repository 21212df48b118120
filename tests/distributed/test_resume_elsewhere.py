"""A run goes on under another engine and on another number of processes: the curve of the run that was not stopped."""

import json
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7000)]


def torchrun(processes: int) -> list[str]:
    program = str(Path(sys.executable).parent / "torchrun")
    return [program, "--standalone", "--nproc_per_node", str(processes), "launch/train.py"]


TORCHRUN = torchrun(2)
PYTHON = [sys.executable, "launch/train.py"]
ZERO = {
    "ZeRO-2": {"stage": 2, "reduce_bucket_size": 10000},
    "ZeRO-2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    # pieces smaller than a group, so that a weight lies in two of them
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
}
TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}  # nothing to compile
STEPS = 4
NEAR = {"rel": 1e-5, "abs": 1e-6}


def curve(command, start: list[str], flags: list[str], files: tuple[Path, Path], out: Path) -> dict[int, float]:
    """Loss of every step."""
    done = command(
        [
            *(*start, "--model_name_or_path", str(files[0]), "--train_data", str(files[1]), "--output_dir", str(out)),
            *("--per_device_train_batch_size", "2", "--global_batch_size", "12", "--max_steps", str(STEPS)),
            *("--learning_rate", "1e-3", "--warmup_steps", "0", "--beta", "0.5", "--max_length", "128"),
            *("--max_prompt_length", "64", "--max_eval_pairs", "4", "--eval_task", "none", "--tracking_uri", "none"),
            *("--segment_rows", "6", *flags),
        ],
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}


def goes_on(command, begun: Path, start: list[str], flags: list[str], files: tuple[Path, Path], out: Path):
    checkpoint = str(begun / "checkpoints" / "step-2")
    found = curve(command, start, [*flags, "--resume_from_checkpoint", checkpoint], files, out)
    assert sorted(found) == [3, 4]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_to_fsdp2_and_plain(command, tiny_model, pairs_file, tmp_path, name):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": ZERO[name]}))
    files = (tiny_model, pairs_file)
    flags = ["--ds_config", str(config), "--save_steps", "2"]
    whole = curve(command, TORCHRUN, flags, files, tmp_path / "zero")
    for number, (start, more) in enumerate(((TORCHRUN, ["--engine", "fsdp2"]), (PYTHON, []))):
        found = goes_on(command, tmp_path / "zero", start, more, files, tmp_path / str(number))
        assert found == pytest.approx({step: whole[step] for step in (3, 4)}, **NEAR)


@pytest.mark.slow
def test_fsdp2_to_one_process_to_plain(command, tiny_model, pairs_file, tmp_path):
    files, save = (tiny_model, pairs_file), ["--engine", "fsdp2", "--save_steps", "2"]
    whole = curve(command, TORCHRUN, save, files, tmp_path / "two")
    kept = {step: whole[step] for step in (3, 4)}
    assert goes_on(command, tmp_path / "two", TORCHRUN, ["--engine", "fsdp2"], files, tmp_path / "a") == kept
    for number, more in enumerate((["--engine", "fsdp2", "--fsdp_cpu_offload", "true"], [])):
        found = goes_on(command, tmp_path / "two", PYTHON, more, files, tmp_path / str(number))
        assert found == pytest.approx(kept, **NEAR)


@pytest.mark.slow
def test_zero_2_to_zero_3_on_three_processes(command, tiny_model, pairs_file, tmp_path):
    configs = {}
    for stage in ("ZeRO-2", "ZeRO-3"):
        configs[stage] = tmp_path / f"{stage}.json"
        configs[stage].write_text(json.dumps({"zero_optimization": ZERO[stage], "optimizer": TORCH_ADAM}))
    files, flags = (tiny_model, pairs_file), ["--ds_config", str(configs["ZeRO-2"]), "--save_steps", "2"]
    whole = curve(command, TORCHRUN, flags, files, tmp_path / "two")
    flags = ["--ds_config", str(configs["ZeRO-3"])]
    found = goes_on(command, tmp_path / "two", torchrun(3), flags, files, tmp_path / "three")
    assert found == pytest.approx({step: whole[step] for step in (3, 4)}, **NEAR)
