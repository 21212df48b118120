"""What the first step says of itself: ln 2 and ties where that is so, nothing of the kind where there is no loss."""

import json

import pytest
import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import TrainingError
from diffdpo.models.load import load_model, save_model
from diffdpo.training.preference import train

AS_IT_MUST = "ln 2 as it must be"


def settings(model, data, out, **more) -> TrainConfig:
    values = {"model_name_or_path": str(model), "train_data": str(data), "output_dir": str(out), "eval_fraction": 0.0}
    values |= {"max_length": 64, "max_prompt_length": 48, "truncation": "drop", "num_mc_samples": 2, "max_steps": 6}
    values |= {"per_device_train_batch_size": 1, "tracking_uri": "none", "learning_rate": 1e-3, "warmup_steps": 0}
    return make_config(TrainConfig, values | more)


def journal(out) -> list[dict]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "grad_norm" in line]


@pytest.fixture
def some_too_long(tmp_path):
    """Six pairs of which every other one does not fit."""
    pairs = [
        {"prompt": "1 " * (100 if n % 2 else 3) + f"{n}?", "chosen": f"{n}1", "rejected": f"{n}2 or"} for n in range(6)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_a_step_without_pairs_has_no_loss_and_says_so(tiny_model, some_too_long, tmp_path, capsys):
    out = tmp_path / "run"
    train(settings(tiny_model, some_too_long, out))
    lines, said = journal(out), capsys.readouterr()
    empty = [line for line in lines if line["data/empty_steps"]]
    assert len(lines) == 6 and len(empty) == 3 and not any("loss" in line for line in empty)
    assert all(line["loss"] > 0 for line in lines if not line["data/empty_steps"])
    assert (said.out + said.err).count("none of its pairs could be used") == 3
    assert (AS_IT_MUST in said.out) == ("loss" in lines[0])


def test_a_mean_over_steps_passes_over_empty_ones(tiny_model, some_too_long, tmp_path):
    train(settings(tiny_model, some_too_long, tmp_path / "run", logging_steps=6, learning_rate=0.0))
    (line,) = journal(tmp_path / "run")
    assert line["loss"] == pytest.approx(0.693147, abs=1e-4) and line["data/empty_steps"] == 3


def test_the_first_step_s_accuracy_is_that_of_a_tie(tiny_model, pairs_file, tmp_path, capsys):
    out = tmp_path / "run"
    train(settings(tiny_model, pairs_file, out, per_device_train_batch_size=4, max_steps=1, max_length=128))
    assert journal(out)[0]["rewards/accuracies"] == 0.5 and AS_IT_MUST in capsys.readouterr().out


def test_a_loss_that_is_no_number_is_not_called_ln_2(tiny_model, pairs_file, tmp_path, capsys):
    loaded = load_model(str(tiny_model))
    with torch.no_grad():
        next(iter(loaded.model.parameters())).fill_(float("nan"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "broken")
    with pytest.raises(TrainingError, match="loss nan"):
        train(settings(tmp_path / "broken", pairs_file, tmp_path / "run", max_length=128))
    assert AS_IT_MUST not in capsys.readouterr().out
