"""Folding token log-probabilities: sums, gradients, standard errors, absent sides."""

import math

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.rows import NoisyRows, noisy_rows
from diffdpo.scores.fold import fold, row_scores


def rows_of(estimator: str, num_samples: int, lengths=((5, 9), (3, None)), draw: int = 0) -> NoisyRows:
    pairs = [
        TokenPair(str(i), *(n and TokenAnswer(np.arange(1, n + 3, dtype=np.int32), 2) for n in both))
        for i, both in enumerate(lengths)
    ]
    batch = collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    return noisy_rows(batch, estimator=estimator, num_samples=num_samples, seed=0, mask_token_id=99, draw=draw)


@pytest.mark.parametrize("estimator", ["mask_count", "balanced", "exact", "trajectory"])
def test_constant_log_probability_gives_tokens_times_it(estimator):
    rows = rows_of(estimator, 4)
    scores = fold(row_scores(torch.full(rows.target_M.shape, -2.0), rows), rows)
    torch.testing.assert_close(scores.score_B2, torch.tensor([[-10.0, -18.0], [-6.0, 0.0]]))
    torch.testing.assert_close(scores.stderr_B2, torch.zeros(2, 2), atol=1e-5, rtol=0)
    assert scores.tokens_B2.tolist() == [[5, 9], [3, 0]]
    assert scores.score_B2.dtype == scores.stderr_B2.dtype == torch.float32


def test_fold_is_the_weighted_sum_and_its_gradient_the_weights():
    rows = rows_of("balanced", 3)
    logp_M = torch.randn(len(rows.target_M), requires_grad=True)
    scores = fold(row_scores(logp_M, rows), rows)
    coefficient_M = rows.weight_R[rows.row_M] * rows.scale_M
    by_hand = torch.zeros(4, dtype=torch.float64).index_add(0, rows.answer_R[rows.row_M], coefficient_M * logp_M)
    torch.testing.assert_close(scores.score_B2.flatten(), by_hand.float())
    scores.score_B2.sum().backward()
    torch.testing.assert_close(logp_M.grad, coefficient_M.float())
    assert not scores.stderr_B2.requires_grad


def test_rows_scored_in_segments_fold_to_the_same():
    rows = rows_of("mask_count_mirror", 4)
    logp_M = torch.randn(len(rows.target_M))
    pieces, start = [], 0
    for first in range(0, len(rows), 3):
        part = rows.taken(torch.arange(first, min(first + 3, len(rows))))
        pieces.append(row_scores(logp_M[start : start + len(part.target_M)], part))
        start += len(part.target_M)
    assert torch.equal(fold(torch.cat(pieces), rows).score_B2, fold(row_scores(logp_M, rows), rows).score_B2)


def test_standard_error_of_equal_rows_is_that_of_a_mean():
    rows = rows_of("mask_count", 4, lengths=((6, None),))
    f_R = torch.zeros(len(rows))
    f_R[:4] = torch.tensor([1.0, 2.0, 4.0, -3.0]) / (4 * rows.weight_R[:4])  # row estimates of the score: 1, 2, 4, -3
    scores = fold(f_R, rows)
    assert scores.score_B2[0, 0].item() == pytest.approx(1.0)
    assert scores.stderr_B2[0, 0].item() == pytest.approx(math.sqrt(np.var([1, 2, 4, -3], ddof=1) / 4))
    assert scores.stderr_B2[0, 1].item() == 0


def test_a_trajectory_of_one_token_is_one_row_to_score_and_knows_no_error():
    rows = rows_of("trajectory", 4, lengths=((1, 2000),))
    scores = fold(row_scores(torch.randn(len(rows.target_M)), rows), rows)
    assert scores.stderr_B2[0, 0].isnan() and scores.stderr_B2[0, 1] > 0


def test_standard_error_of_a_trajectory_counts_its_tokens():
    """Independent noise of variance 1: L tokens have a standard error of sqrt(L), however they fall on the steps."""
    found = []
    for draw in range(200):
        rows = rows_of("trajectory", 8, lengths=((64, None),), draw=draw)
        noise_M = torch.from_numpy(np.random.default_rng(draw).normal(-3.0, 1.0, len(rows.target_M)))
        found.append(fold(row_scores(noise_M, rows), rows).stderr_B2[0, 0].item())
    assert 8.0 < np.sqrt(np.mean(np.square(found))) < 9.0


def test_one_row_knows_no_error_and_exact_has_none():
    one = rows_of("mask_count", 1, lengths=((6, 3),))
    assert fold(torch.ones(len(one)), one).stderr_B2.isnan().all()
    every = rows_of("exact", 1, lengths=((6, 3),))
    assert (fold(torch.randn(len(every)), every).stderr_B2 == 0).all()


def test_standard_error_matches_the_spread_over_draws():
    """For independent rows, mean of stderr² over draws = variance of the score."""
    weight_L = torch.linspace(-3, 1, 9)
    scores, squares = [], []
    for draw in range(1500):
        rows = rows_of("mask_count", 4, lengths=((9, None),), draw=draw)
        folded = fold(row_scores(weight_L[rows.position_M - 2], rows), rows)
        scores.append(folded.score_B2[0, 0].item())
        squares.append(folded.stderr_B2[0, 0].item() ** 2)
    assert np.mean(squares) == pytest.approx(np.var(scores), rel=0.15)
