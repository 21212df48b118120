"""Micro-batches of generated pairs, shared by the tests of a step."""

import pytest

from data_pipeline.encode import Encoder
from data_pipeline.reader import PairLoader, open_dataset
from diffdpo.models.load import load_model


@pytest.fixture(scope="module")
def batches(tiny_model, pairs_file, tmp_path_factory):
    loaded = load_model(str(tiny_model))
    dataset = open_dataset(str(pairs_file), cache_dir=tmp_path_factory.mktemp("cache"))
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    loader = PairLoader(dataset, encoder, seed=0, global_batch_size=4, micro_batch_size=4)
    return list(loader)
