"""`--max_memory`: what a run does with what it has measured."""

import json
from pathlib import Path

import pytest
import yaml

from diffdpo.memory.largest_fit import Fit
from launch.train import main

FLAGS = ["--tracking_uri", "none", "--num_generated_pairs", "32", "--num_eval_problems", "0", "--eval_task", "none"]
FLAGS += ["--max_eval_pairs", "16", "--num_mc_samples", "2", "--max_length", "128", "--max_prompt_length", "64"]
SMALL = """
import sys
from diffdpo.memory.largest_fit import Fit
from diffdpo.step import fit as sizing
from launch.train import main
sizing.largest_fit = lambda measure, *, budget, most: Fit(8, 10**9, ((8, measure(8) and 10**8),))
sys.exit(main(sys.argv[1:]))
"""


def run(out: Path, *more: str) -> list[dict]:
    """The lines of metrics.jsonl."""
    assert main([*FLAGS, "--output_dir", str(out), *more]) == 0
    return lines_of(out)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_held_out_margins_are_0_before_training_on_scores_made_before(tmp_path):
    flags = ["--reference", "precomputed", "--max_memory", "0.001", "--max_steps", "1", "--seed", "6"]
    before = next(line for line in run(tmp_path / "run", *flags) if "eval/rewards/margins" in line)
    assert before["eval/rewards/accuracies"] == 0.5 and before["eval/rewards/margins"] == 0.0


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def fits(monkeypatch):
    """As many rows fit as it is told."""

    def say(rows: int) -> None:
        found = Fit(rows, 10**9, ((rows, 10**8),))
        monkeypatch.setattr("diffdpo.step.fit.largest_fit", lambda measure, *, budget, most: found)

    return say


STEP = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


@pytest.mark.parametrize(("rows", "pairs"), [(8, 2), (32, 8)])
def test_the_micro_batch_is_measured_and_the_run_is_the_same(tmp_path, fits, capsys, rows, pairs):
    """Smaller and larger than the four pairs asked for; the chosen one is on the screen and in config.yaml."""
    flags = [*STEP, "--max_steps", "3"]
    expected = losses(run(tmp_path / "given", *flags))
    fits(rows)
    found = losses(run(tmp_path / "measured", *flags, "--max_memory", "0.5"))
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 3
    assert f"micro-batches of {pairs}, {8 // pairs} a step, instead of 4, 2 a step" in capsys.readouterr().out
    recorded = yaml.safe_load((tmp_path / "measured" / "config.yaml").read_text())
    assert (recorded["per_device_train_batch_size"], recorded["gradient_accumulation_steps"]) == (pairs, 8 // pairs)


@pytest.mark.slow
def test_deepspeed_is_told_the_sizes_asked_for_and_takes_the_same_steps(tmp_path, command, python):
    """Made before anything can be measured; no gradient depends on its sizes, with the optimizer on the host either."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    adam = {"params": {"torch_adam": True}}
    ds_config = {"zero_optimization": zero, "optimizer": adam, "zero_force_ds_cpu_optimizer": False}
    (tmp_path / "ds.json").write_text(json.dumps(ds_config))
    flags = [*FLAGS, "--per_device_train_batch_size", "8", "--max_steps", "3", "--ds_config", str(tmp_path / "ds.json")]
    found = {}
    for memory in ("0", "0.5"):
        flags = [*flags, "--output_dir", str(tmp_path / memory), "--max_memory", memory]
        done = command([python, "-c", SMALL, *flags])
        assert done.returncode == 0, done.stderr
        found[memory] = losses(lines_of(tmp_path / memory))
    assert "micro-batches of 2, 4 a step, instead of 8, 1 a step" in done.stdout
    assert found["0.5"] == pytest.approx(found["0"], abs=1e-5) and len(found["0"]) == 3


def test_a_run_goes_on_in_another_micro_batch(tmp_path, fits, capsys):
    flags = [*STEP, "--max_memory", "0.5", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    fits(16)
    whole = losses(run(tmp_path / "constant", *flags, "--max_steps", "4"))
    run(tmp_path / "parts", *flags, "--max_steps", "3")
    fits(32)
    capsys.readouterr()
    resumed = losses(run(tmp_path / "parts", *flags, "--max_steps", "4", "--resume_from_checkpoint", "latest"))
    said = capsys.readouterr().out
    assert "micro-batches of 8, 1 a step" in said and "batch_size was" not in said
    assert resumed == pytest.approx(whole, abs=1e-5)
