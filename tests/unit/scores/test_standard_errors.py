"""The reported standard error is the spread over draws, and the spread falls with n: on hand-made models of tokens.

What holds at which n, and what cannot hold: docs/theory.md, section 4. Draws are few, so bounds are 2 to 3 of their
standard errors wide.
"""

import itertools

import numpy as np
import pytest

from benchmarks.standard_errors import difference, hand_made, leaning, measure, words

FEW = [words(5, 0), difference(words(5, 0, moved=0.3), words(5, 0)), leaning(5, 1), leaning(5, 2)]
INDEPENDENT = ["uniform_t", "mask_count"]
STRATIFIED = ["stratified_t", "mask_count_mirror", "quadrature"]


@pytest.mark.parametrize(
    ("estimator", "num_samples"),
    [*((name, n) for name in (*INDEPENDENT, *STRATIFIED) for n in (8, 40)), ("balanced", 32), ("balanced", 100)],
)
def test_reported_error_is_the_spread(estimator, num_samples):
    spread_Q, reported_Q = measure(estimator, 5, num_samples, FEW, draws=150)
    assert (reported_Q > 0.8 * spread_Q).all() and (reported_Q < 1.5 * spread_Q).all()


def test_error_of_several_trajectories_is_their_spread():
    spread_Q, reported_Q = measure("trajectory", 5, 20, FEW, draws=150, num_diffusion_steps=4)
    assert (reported_Q > 0.8 * spread_Q).all() and (reported_Q < 1.5 * spread_Q).all()


@pytest.mark.parametrize("num_samples", [4, 12])
def test_reported_error_of_one_block_errs_on_the_large_side(num_samples):
    spread_Q, reported_Q = measure("balanced", 5, num_samples, FEW, draws=150)
    assert (reported_Q > spread_Q).all()


@pytest.mark.parametrize("length", [3, 9])
def test_variance_of_balanced_falls_as_1_over_n_or_faster(length):
    """One assignment of tokens to slots for all rows once kept it at that of 64 rows, whatever n."""
    models = [words(length, 0), difference(words(length, 0, moved=0.3), words(length, 0)), leaning(length, 1)]
    per_row = [n * measure("balanced", length, n, models, draws=200)[0] ** 2 for n in (4, 16, 64, 128)]
    for fewer, more in itertools.pairwise(per_row):
        assert (more < 1.5 * fewer).all()  # quotients of variances of 200 draws each: ± 0.15
    assert (per_row[-1] < 1.2 * per_row[0]).all()


def test_equal_counts_no_longer_give_equal_masks():
    """Interactions alone: every token wants one other to be visible, so only which tokens a mask has matters."""

    def partner(masked_NL: np.ndarray) -> np.ndarray:
        return -np.roll(masked_NL, 1, axis=1).astype(float)

    for n in (8, 16, 64):
        balanced, independent = (measure(name, 6, n, [partner], draws=100)[0] for name in ("balanced", "mask_count"))
        assert balanced < 0.7 * independent


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4, 17, 64])
@pytest.mark.parametrize("num_samples", [2, 3, 4, 8, 16, 31, 32, 48, 64, 258, 1024, 4096])
@pytest.mark.parametrize("estimator", [*INDEPENDENT, *STRATIFIED, "balanced"])
def test_reported_error_at_every_length_and_number(estimator, length, num_samples):
    models = [model for several in hand_made(length, answers=2).values() for model in several]
    spread_Q, reported_Q = measure(estimator, length, num_samples, models, draws=100)
    told = spread_Q > 1e-6  # the rest is rounding: one token, or errors that cancel to the last digit
    if not told.any():
        return
    quotient_Q = reported_Q[told] / spread_Q[told]
    assert np.exp(np.log(quotient_Q).mean()) > 0.8 and quotient_Q.min() > 0.6  # of twelve, each known to 0.1
    if estimator in INDEPENDENT or num_samples >= (32 if estimator == "balanced" else 64):
        assert np.exp(np.log(quotient_Q).mean()) < 1.5 and quotient_Q.max() < 2.0
