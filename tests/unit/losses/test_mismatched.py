"""Mismatched answers: each prompt keeps its place and gets the answer of another one, whatever the step is cut into."""

import json

import numpy as np
import pytest

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import Encoder, TokenAnswer, TokenPair
from data_pipeline.reader import PairLoader, open_dataset
from diffdpo.losses.mismatched import mismatched


def tokens(prompt, answer):
    return TokenAnswer(np.array(prompt + answer, dtype=np.int32), len(prompt))


def batch_of(*pairs) -> PairBatch:
    return collate(list(pairs), pad_id=0, epoch=3, step=1, micro=0, last_micro=True)


def rows(batch: PairBatch) -> dict[tuple[str, int], list[int]]:
    """Tokens of every answer there is, by record and side."""
    return {
        (batch.ids[b], side): batch.input_ids_B2T[b, side, : batch.lengths_B2[b, side]].tolist()
        for b in range(len(batch.ids))
        for side in (0, 1)
        if batch.lengths_B2[b, side]
    }


def alone(batch: PairBatch, **options) -> PairBatch:
    return mismatched([[batch]], rank=0, **options)[0]


def test_answers_move_on_by_one_chosen_ones_first_and_absent_sides_stay_absent():
    batch = batch_of(
        TokenPair("a", tokens([1, 2], [10]), tokens([1, 2], [11, 12])),
        None,
        TokenPair("c", tokens([5], [13]), None),
        TokenPair("d", None, tokens([6], [14, 15, 16])),
    )
    other = alone(batch)
    assert rows(other) == {
        ("a/mismatched", 0): [1, 2, 14, 15, 16],  # order: a+, c+, a-, d-
        ("c/mismatched", 0): [5, 10],
        ("a/mismatched", 1): [1, 2, 13],
        ("d/mismatched", 1): [6, 11, 12],
    }
    assert other.prompt_lengths_B2[0].tolist() == [2, 2] and other.lengths_B2[1].tolist() == [0, 0]
    assert other.weight_B2.equal(batch.weight_B2) and other.epoch == 3
    assert other.ids[0] != batch.ids[0]  # noise of its own


def test_an_answer_never_meets_its_own_prompt():
    same = [TokenPair(name, tokens([1], [k]), tokens([1], [k + 5])) for name, k in (("a", 10), ("b", 20))]
    batch = batch_of(*same, TokenPair("c", tokens([2], [30]), None))
    answers = {key: ids[1:] for key, ids in rows(alone(batch)).items()}
    assert all(ids == [30] for (name, _), ids in answers.items() if name != "c/mismatched")
    assert answers["c/mismatched", 0] == [20]


def test_one_prompt_alone_has_nothing_to_mismatch():
    batch = batch_of(TokenPair("a", tokens([1], [2, 3]), tokens([1], [4])))
    assert alone(batch).weight_B2.sum() == 0
    assert alone(batch_of(None, None)).weight_B2.sum() == 0


def test_joined_rows_are_cut_to_the_longest_allowed():
    batch = batch_of(
        TokenPair("a", tokens([1, 2, 3, 4, 5, 6], [7]), None), TokenPair("b", tokens([9], list(range(20, 29))), None)
    )
    found = rows(alone(batch, max_length=10))
    assert found["a/mismatched", 0] == [2, 3, 4, 5, 6, 20, 21, 22, 23, 24]  # half is the prompt's, its end
    assert found["b/mismatched", 0] == [9, 7]


@pytest.fixture(scope="module")
def unpaired_file(tmp_path_factory):
    """21 records: pairs, desirable and undesirable answers, of all lengths."""
    path, rng = tmp_path_factory.mktemp("unpaired") / "data.jsonl", np.random.default_rng(0)
    lines = []
    for i in range(21):
        text = " ".join("word" for _ in range(rng.integers(1, 9)))
        pair = {"chosen": f"yes {i} {text}", "rejected": f"no {i}"}
        single = {"completion": f"so {i} {text}", "label": bool(i % 2)}
        lines.append({"id": str(i), "prompt": f"question {i}?"} | (pair if i % 3 == 0 else single))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_partners_do_not_depend_on_ranks_and_micro_batches(unpaired_file, tiny_model, tmp_path):
    """Through the reader: the last step of an epoch has empty slots."""
    from diffdpo.models.load import load_model

    dataset = open_dataset(str(unpaired_file), cache_dir=tmp_path)
    encoder = Encoder(load_model(str(tiny_model)).tokenizer, max_length=64, max_prompt_length=32)

    def partners(world_size: int, micro: int, **options) -> list[dict]:
        ranks = [
            PairLoader(
                dataset, encoder, seed=0, global_batch_size=8, micro_batch_size=micro, rank=rank,
                world_size=world_size, **options,
            ).steps()
            for rank in range(world_size)
        ]  # fmt: skip
        found = []
        for _ in range(3):
            step, joined = [next(steps) for steps in ranks], {}
            for rank in range(world_size):
                for batch in mismatched(step, rank=rank, max_length=30):
                    joined.update(rows(batch))
            found.append(joined)
        return found

    expected = partners(1, 8)
    assert [len(step) for step in expected] == [len(step) for step in partners(1, 8)]
    assert sum(len(step) for step in expected) == 21 + 7
    for world_size, micro in ((1, 4), (1, 2), (2, 4), (2, 2), (4, 2), (8, 1)):
        assert partners(world_size, micro) == expected
    assert partners(2, 2, batching="balanced") == expected
