"""Which answers make pairs."""

import numpy as np
import pytest

from diffdpo.config import PairsConfig
from diffdpo.onpolicy.pairing import Judged, pairs_of

JUDGED = Judged(
    texts=["a", "b", "c", "b", "", "d", "e"], tokens=[5, 9, 6, 9, 0, 8, 30], scores=[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
)
RIGHT, WRONG = {0, 2, 6}, {1, 5}  # 3 has the text of 1, 4 is empty


def pairs(judged=JUDGED, seed=0, **settings):
    return pairs_of(judged, PairsConfig(output_dir="x", **settings), np.random.default_rng(seed))


def test_the_best_against_the_worst_is_one_pair():
    assert pairs(pairing="best_worst") == [(0, 1)]
    graded = Judged(["a", "b", "c"], [1, 1, 1], [0.2, 0.9, 0.1])
    assert pairs(graded, pairing="best_worst") == [(1, 2)]


def test_right_against_wrong_is_every_pair_once_and_uses_all_before_any_comes_again():
    found = pairs(pairing="right_wrong", max_pairs=0)
    assert set(found) == {(i, j) for i in RIGHT for j in WRONG} and len(found) == len(set(found)) == 6
    for seed in range(5):
        first = pairs(pairing="right_wrong", max_pairs=3, seed=seed)
        assert {i for i, _ in first} == RIGHT and {j for _, j in first} == WRONG
    many = Judged([str(i) for i in range(8)], [1] * 8, [1.0] * 4 + [0.0] * 4)
    assert len(set(pairs(many, pairing="right_wrong", max_pairs=0))) == 16


def test_lengths_are_matched_and_no_answer_comes_twice():
    assert pairs(pairing="length_matched", max_pairs=0) == [(2, 5), (0, 1)]


def test_a_margin_of_scores():
    graded = Judged(["a", "b", "c"], [1, 1, 1], [0.1, 0.5, 0.9])
    assert set(pairs(graded, pairing="margin", margin=0.3, max_pairs=0)) == {(1, 0), (2, 1), (2, 0)}
    assert pairs(graded, pairing="margin", margin=0.6) == [(2, 0)]
    assert pairs(graded, pairing="best_worst", margin=0.9) == []


@pytest.mark.parametrize("pairing", ["best_worst", "right_wrong", "length_matched", "margin"])
@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_answers_that_are_all_alike_make_no_pair(pairing, scores):
    alike = Judged(["a", "b", "c"], [1, 2, 3], scores)
    assert pairs(alike, pairing=pairing, margin=0.1 if pairing == "margin" else 0.0) == []
    assert pairs(Judged(["", " "], [0, 1], [0.0, 1.0]), pairing="best_worst") == []
