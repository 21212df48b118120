"""What is known of data before training, from the index alone."""

import pytest

from data_pipeline.dataset import open_dataset
from data_pipeline.facts import Kinds, Overlap, count_kinds, longest_text, overlap
from data_pipeline.tokenizer import context_length, first_id, tokenizer_difference


@pytest.fixture
def opened(tmp_path, cache, jsonl):
    """A data set of the given rows."""

    def make(rows):
        path = jsonl(tmp_path / f"{len(list(tmp_path.glob('*.jsonl')))}.jsonl", rows)
        return open_dataset(str(path), cache_dir=cache)

    return make


def answer(prompt, text, label):
    return {"prompt": prompt, "completion": text, "label": label}


def test_kinds(opened, make_rows):
    assert count_kinds(opened(make_rows(5))) == Kinds(5, 0, 0, 5)
    good = [answer(f"q{i}", "a", True) for i in range(3)]
    assert count_kinds(opened(good)) == Kinds(0, 3, 0, 3)
    one_prompt = [answer("q", "a", True), answer("q", "b", False), answer("q", "c", False)]
    assert count_kinds(opened(one_prompt)) == Kinds(0, 1, 2, 1)


def test_overlap(opened, make_rows):
    train = opened(make_rows(10))
    assert overlap(train, opened(make_rows(10))) == Overlap(10, 10, 10)
    assert overlap(train, opened(make_rows(10, start=20))) == Overlap(10, 0, 0)
    other_answers = [row | {"chosen": "another"} for row in make_rows(4)] + make_rows(1, start=3)
    assert overlap(train, opened([row | {"id": f"n{i}"} for i, row in enumerate(other_answers)])) == Overlap(5, 1, 5)


def test_longest_text(opened):
    rows = [{"prompt": "abc", "chosen": "ö" * 5, "rejected": "x"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert longest_text(opened(rows)) == 13


def test_tokenizers_that_read_other_ids(make_tokenizer):
    plain, merged = make_tokenizer(), make_tokenizer(merges=[("b", "c")])
    assert tokenizer_difference(plain, make_tokenizer()) == ""
    assert "1 tokens have different ids, first 'bc'" in tokenizer_difference(plain, merged)
    upper = make_tokenizer()
    from tokenizers.normalizers import Lowercase

    upper._tokenizer.normalizer = Lowercase()
    assert tokenizer_difference(plain, upper) == "the same text becomes different tokens"


def test_ids_and_lengths_of_a_config():
    assert [first_id(value) for value in (3, [4, 5], None, [], 0)] == [3, 4, None, None, 0]
    assert first_id(None, [7], 3) == 7
    assert context_length({"max_sequence_length": 4096}) == 4096
    assert context_length({"max_position_embeddings": 32}) == 32 and context_length({}) is None
