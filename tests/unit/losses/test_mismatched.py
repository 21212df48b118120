"""Mismatched answers: each prompt keeps its place and gets the previous answer."""

import numpy as np

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.losses.mismatched import mismatched


def tokens(prompt, answer):
    return TokenAnswer(np.array(prompt + answer, dtype=np.int32), len(prompt))


def test_answers_move_on_by_one_and_absent_sides_stay_absent():
    pairs = [
        TokenPair("a", tokens([1, 2], [10]), tokens([1, 2], [11, 12])),
        None,
        TokenPair("c", None, tokens([5], [13, 14, 15])),
    ]
    batch = collate(pairs, pad_id=0, epoch=3, step=1, micro=0, last_micro=True)
    other = mismatched(batch)
    rows = [other.input_ids_B2T[b, s, : other.lengths_B2[b, s]].tolist() for b, s in ((0, 0), (0, 1), (2, 1))]
    assert rows == [[1, 2, 13, 14, 15], [1, 2, 10], [5, 11, 12]]
    assert other.prompt_lengths_B2[0].tolist() == [2, 2] and other.lengths_B2[1].tolist() == [0, 0]
    assert other.weight_B2.equal(batch.weight_B2) and other.epoch == 3
    assert other.ids[0] != batch.ids[0]  # noise of its own


def test_a_single_answer_stays():
    batch = collate([TokenPair("a", tokens([1], [2, 3]), None)], pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    assert mismatched(batch).input_ids_B2T[0, 0].tolist() == [1, 2, 3]


def test_an_empty_batch_stays_empty():
    batch = collate([None, None], pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    assert mismatched(batch).weight_B2.sum() == 0
