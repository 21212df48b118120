"""Early stopping and the best model, by the public command: the curve decides, also after a kill in between."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffdpo.cli import train
from diffdpo.tracking.journal import FILE, read_journal


def flags_of(tiny_model, pairs_file, out, *more):
    shared = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--eval_data", str(pairs_file)]
    shared += ["--max_eval_pairs", "8", "--eval_task", "none", "--num_mc_samples", "1", "--tracking_uri", "none"]
    shared += ["--max_length", "128", "--max_prompt_length", "64", "--warmup_steps", "0", "--output_dir", str(out)]
    shared += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--save_total_limit", "1"]
    # a rate at which the margin only grows: asked for the smallest, the first evaluation is the best
    return [*shared, "--learning_rate", "2e-2", "--lr_scheduler_type", "constant", "--seed", "2", *more]


BEST = ["--eval_steps", "2", "--load_best_model_at_end", "--metric_for_best_model", "rewards/margins", "--max_steps"]
BEST += ["8", "--greater_is_better", "false"]


def curve_of(out):
    name = "eval/rewards/margins"
    return {line["step"]: line[name] for line in read_journal(out / FILE) if name in line}


@pytest.fixture(scope="module")
def whole(tiny_model, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("best") / "run"
    train.main(flags_of(tiny_model, pairs_file, out, *BEST))
    return out


def weights(folder):
    (file,) = (folder / "final").glob("*.safetensors")
    return load_file(file)


def test_the_final_model_is_the_best_of_the_evaluations(whole, tiny_model):
    curve, summary = curve_of(whole), json.loads((whole / "summary.json").read_text())
    best = min((step for step in curve if step), key=curve.get)
    assert best == 2 and set(curve) == {0, 2, 4, 6, 8}
    assert summary["kept_step"] == best and summary["steps"] == 8
    assert summary["held_out"]["rewards/margins"]["after"]["mean"] == pytest.approx(curve[best], rel=1e-5)
    kept = {path.name for path in (whole / "checkpoints").glob("step-*")}
    assert f"step-{best}" in kept and len(kept) <= 2, "the best stays beside the newest"


def test_patience_ends_the_run_and_a_resumed_run_counts_on(whole, tiny_model, pairs_file, tmp_path):
    patience = ["--early_stopping_patience", "2"]
    train.main(flags_of(tiny_model, pairs_file, tmp_path / "patient", *BEST, *patience))
    steps = json.loads((tmp_path / "patient" / "summary.json").read_text())["steps"]
    assert steps == 6, "the evaluations after 4 and 6 were no better than the one after 2"
    # told to stop in the middle and resumed: the same end, the same model
    halves = flags_of(tiny_model, pairs_file, tmp_path / "halves", *BEST, *patience, "--save_steps", "1")
    from diffdpo import Callback
    from diffdpo.cli.flags import parse_config
    from diffdpo.config import TrainConfig
    from diffdpo.training import preference

    class StopsAfterFour(Callback):
        def on_step(self, step, report):
            return step == 4

    assert not preference.train(parse_config(TrainConfig, halves, ""), callbacks=[StopsAfterFour()]).complete
    train.main([*halves, "--resume_from_checkpoint", "latest"])
    assert json.loads((tmp_path / "halves" / "summary.json").read_text())["steps"] == steps
    for (name, a), b in zip(weights(tmp_path / "patient").items(), weights(tmp_path / "halves").values(), strict=True):
        assert torch.equal(a, b), name
