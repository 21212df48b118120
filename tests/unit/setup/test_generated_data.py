"""Generated data: nothing in them has to be left out, and so nothing is told."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.dataset import open_dataset
from data_pipeline.generate import generate_pairs, write_jsonl
from diffdpo.config import SftConfig, TrainConfig
from diffdpo.engine.world import World
from diffdpo.setup.data import generated

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("config", [TrainConfig(num_generated_pairs=3200), SftConfig(num_generated_answers=3200)])
def test_no_record_stands_there_twice(config, tmp_path, caplog):
    train, _ = generated(config, WORLD)(tmp_path)
    drawn = Path(train).read_text().splitlines()
    assert len({json.dumps({**json.loads(line), "id": ""}) for line in drawn}) == len(drawn) < 3200
    dataset = open_dataset(train, cache_dir=tmp_path / "cache")
    assert len(dataset) == len(drawn) and not caplog.records


def test_the_records_are_those_that_were_drawn(tmp_path):
    train, _ = generated(TrainConfig(num_generated_pairs=3200), WORLD)(tmp_path)
    write_jsonl(generate_pairs(3200, seed=0), tmp_path / "all.jsonl")
    kept, drawn = (open_dataset(str(path), cache_dir=tmp_path / "cache") for path in (train, tmp_path / "all.jsonl"))
    assert kept.fingerprint == drawn.fingerprint
