"""A small model that commands may save and load."""

import pytest

from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["12 + 3 = 15, so the answer is 15"] * 5, vocab_size=290)


@pytest.fixture
def model(tokenizer):
    return new_model(tokenizer, width=32, layers=2, heads=4, seed=0).double()
