"""What a run makes of the data flags: several sources, their shares, damaged shards."""

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.shard_builder import BuildOptions, build
from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError

TRAIN = [sys.executable, "launch/train.py", "--tracking_uri", "none"]


@pytest.fixture
def sources(tmp_path: Path, pairs_file: Path) -> tuple[str, Path]:
    """(a file of 24 pairs, shards of 40)."""
    lines = pairs_file.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:24]), ("b", lines[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    build([str(tmp_path / "b.jsonl")], tmp_path / "shards", BuildOptions(shard_size=10))
    return str(tmp_path / "a.jsonl"), tmp_path / "shards"


def flags(tiny_model: Path, data: str, out: Path) -> list[str]:
    named = {"model_name_or_path": tiny_model, "train_data": data, "output_dir": out, "max_length": 200}
    named |= {"max_prompt_length": 100, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    named |= {"max_eval_pairs": 8, "num_mc_samples": 2, "learning_rate": 1e-4}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
def test_a_run_mixes_sources_by_weight(command, tiny_model, sources, tmp_path, reference):
    order = ["--data_weights", "3,1", "--batching", "balanced", "--bucket_steps", "2", "--tail", "drop"]
    base = flags(tiny_model, f"{sources[0]},{sources[1]}", tmp_path / "run")
    done = command([*TRAIN, *base, *order, "--reference", reference, "--template", "plain", "--num_train_epochs", "1"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 7, "58 records of training, 8 a step, the rest left out"
    assert losses[0] == pytest.approx(0.69314718, abs=1e-5)


def test_damaged_shards_are_refused_until_they_are_allowed(command, tiny_model, sources, tmp_path):
    shard = sources[1] / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    base = [*TRAIN, *flags(tiny_model, str(sources[1]), tmp_path / "run"), "--max_steps", "2"]
    refused = command(base)
    assert refused.returncode == 2 and "--allow_damaged" in refused.stderr
    done = command([*base, "--allow_damaged", "--max_fault_fraction", "1"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_data": "a,b", "data_weights": "1"}, "one number, at least 0, for each of the 2 sources"),
        ({"train_data": "a,b", "data_weights": "0,0"}, "not all 0"),
        ({"train_data": "a,b", "data_weights": "1,x"}, "give numbers with commas"),
        ({"data_weights": "1"}, "of the 0 sources"),
        ({"train_data": "a,b", "data_weights": "1,2", "shuffle_shards": 2}, "leave one out"),
        ({"train_data": "a,none.jsonl"}, "none.jsonl: no such file"),
        ({"strict": True, "allow_damaged": True}, "leave one of the two out"),
        ({"max_fault_fraction": 2.0}, "in \\[0, 1\\]"),
        ({"bucket_steps": -1}, "at least 0"),
        ({"shuffle_shards": -1}, "at least 0"),
    ],
)
def test_wrong_flags_are_one_line(given, said):
    with pytest.raises(UserError, match=said) as error:
        make_config(TrainConfig, given)
    assert "\n" not in str(error.value)
