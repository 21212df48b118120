"""Noise plans: what every estimator promises about its rows, and what a plan depends on."""

import itertools

import numpy as np
import pytest

from diffdpo.errors import UserError
from diffdpo.noise.estimators import ESTIMATORS, MAX_EXACT_LENGTH, draw_plan, num_rows
from diffdpo.noise.plan import NoiseKey

KEY = NoiseKey(seed=1, epoch=2, record_id="a", side=0)
SAMPLED = [name for name in ESTIMATORS if name != "exact"]
COUNTED = [
    "mask_count",
    "mask_count_mirror",
    "balanced",
    "paired",
]  # rows whose token weights add up to L in every draw


def token_weights(plan) -> np.ndarray:
    scale = 1.0 if plan.scale_NL is None else plan.scale_NL
    return plan.weight_N[:, None] * np.where(plan.scored_NL, scale, 0.0)


@pytest.mark.parametrize("estimator", SAMPLED)
@pytest.mark.parametrize(("length", "num_samples"), [(1, 1), (1, 5), (2, 3), (7, 4), (40, 1), (40, 7), (3000, 6)])
def test_rows_are_well_formed(estimator, length, num_samples):
    plan = draw_plan(estimator, length=length, num_samples=num_samples, key=KEY)
    assert plan.masked_NL.shape == plan.scored_NL.shape == (num_samples, length)
    assert len(plan) == num_rows(estimator, length=length, num_samples=num_samples)
    assert not (plan.scored_NL & ~plan.masked_NL).any()
    assert np.isfinite(plan.weight_N).all()
    assert (plan.weight_N > 0).all()
    assert plan.share_N.sum() == pytest.approx(length)


@pytest.mark.parametrize("estimator", COUNTED)
@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
def test_a_constant_per_token_is_estimated_without_error(estimator, num_samples):
    for draw in range(20):
        plan = draw_plan(estimator, length=13, num_samples=num_samples, key=NoiseKey(0, 0, "x", 0, draw))
        assert token_weights(plan).sum() == pytest.approx(13)
        assert plan.masked_NL.any(1).all()


def test_mirror_pairs_cover_every_token_and_their_counts_complement():
    plan = draw_plan("mask_count_mirror", length=9, num_samples=6, key=KEY)
    for first, second in zip(plan.masked_NL[0::2], plan.masked_NL[1::2], strict=True):
        assert (first | second).all()
        assert first.sum() + second.sum() == 10


@pytest.mark.parametrize("estimator", COUNTED)
@pytest.mark.parametrize("num_samples", [1, 2, 3, 4])
def test_every_count_gets_its_share_of_weight(estimator, num_samples):
    """Unbiasedness needs the expected token weight at each mask size k to be 1 (the score is a mean over k)."""
    length, draws, weight_K = 6, 6000, np.zeros(7)
    for draw in range(draws):
        plan = draw_plan(estimator, length=length, num_samples=num_samples, key=NoiseKey(3, 0, "x", 0, draw))
        np.add.at(weight_K, plan.masked_NL.sum(1), token_weights(plan).sum(1) / draws)
    assert weight_K[0] == 0
    # the weight at one k is at most L a draw, so its standard error is below L / (2 sqrt(draws)) = 0.04
    np.testing.assert_allclose(weight_K[1:], 1.0, atol=0.14)


def test_trajectory_visits_every_step_once_and_scores_every_token_once():
    plan = draw_plan("trajectory", length=50, num_samples=8, key=KEY, num_diffusion_steps=8)
    assert (plan.scored_NL.sum(0) == 1).all()
    order = np.argsort(plan.masked_NL.sum(1))
    assert all((plan.masked_NL[a] <= plan.masked_NL[b]).all() for a, b in itertools.pairwise(order))
    np.testing.assert_array_equal(plan.weight_N, 1.0)


def test_trajectory_subset_and_overrun_weights():
    part = draw_plan("trajectory", length=50, num_samples=3, key=KEY, num_diffusion_steps=12)
    np.testing.assert_allclose(part.weight_N, 4.0)
    more = draw_plan("trajectory", length=50, num_samples=10, key=KEY, num_diffusion_steps=4)
    np.testing.assert_allclose(more.weight_N, 0.4)
    assert (more.scored_NL[:4].sum(0) == 1).all() and (more.scored_NL[4:8].sum(0) == 1).all()


def test_exact_enumerates_every_mask():
    plan = draw_plan("exact", length=4, num_samples=1, key=KEY)
    assert len({tuple(row) for row in plan.masked_NL.tolist()}) == len(plan) == 15
    np.testing.assert_allclose(token_weights(plan).sum(), 4.0)


def test_a_plan_depends_on_its_key_and_on_every_field_of_it():
    base = draw_plan("mask_count", length=64, num_samples=4, key=KEY)
    again = draw_plan("mask_count", length=64, num_samples=4, key=NoiseKey(1, 2, "a", 0, 0))
    np.testing.assert_array_equal(base.masked_NL, again.masked_NL)
    others = [(9, 2, "a", 0, 0), (1, 9, "a", 0, 0), (1, 2, "b", 0, 0), (1, 2, "a", 1, 0), (1, 2, "a", 0, 1)]
    for other in others:
        changed = draw_plan("mask_count", length=64, num_samples=4, key=NoiseKey(*other))
        assert (changed.masked_NL != base.masked_NL).any()


def test_a_plan_ignores_global_random_state():
    np.random.seed(0)
    first = draw_plan("balanced", length=30, num_samples=4, key=KEY).masked_NL
    np.random.seed(1)
    np.testing.assert_array_equal(first, draw_plan("balanced", length=30, num_samples=4, key=KEY).masked_NL)


def test_a_plan_is_the_same_on_every_machine():
    """Recorded once: a change means that old runs cannot be resumed or compared."""
    plan = draw_plan("mask_count", length=8, num_samples=2, key=NoiseKey(7, 1, "pair-é", 1))
    assert (plan.masked_NL @ (1 << np.arange(8))).tolist() == [221, 223]


def test_the_default_plan_is_the_same_on_every_machine():
    """Strata, layout, weights and constants: after a change of any, scores that were stored are those of other rows."""
    plan = draw_plan("balanced", length=12, num_samples=4, key=NoiseKey(7, 1, "pair-é", 1))
    assert (plan.masked_NL @ (1 << np.arange(12))).tolist() == [257, 82, 3752, 4095]
    weight_NL = token_weights(plan)
    np.testing.assert_allclose(weight_NL.sum(1), [2.198992, 2.937924, 3.301263, 3.561821], rtol=1e-6)
    each = [sorted({round(float(weight), 5) for weight in row if weight}) for row in weight_NL]
    assert each == [[1.0995], [0.97931], [0.55021], [0.23461, 0.24665, 0.3072, 0.50948]]


def test_paired_sides_share_noise_where_they_agree_and_others_do_not():
    def masks(estimator: str, side: int, length: int) -> np.ndarray:
        return draw_plan(estimator, length=length, num_samples=4, key=NoiseKey(1, 0, "a", side)).masked_NL

    np.testing.assert_array_equal(masks("paired", 0, 200), masks("paired", 1, 200))
    assert (masks("paired", 0, 200) == masks("paired", 1, 204)[:, :200]).mean() > 0.95
    assert (masks("balanced", 0, 200) == masks("balanced", 1, 200)).mean() < 0.8


def test_draws_of_different_keys_are_uncorrelated():
    def coverage(side: int, epoch: int, draw: int) -> np.ndarray:
        plans = [
            draw_plan("mask_count", length=16, num_samples=1, key=NoiseKey(0, epoch, str(i), side, draw))
            for i in range(1500)
        ]
        return np.array([token_weights(plan)[0, 0] for plan in plans])

    base = coverage(0, 0, 0)
    for other in (coverage(1, 0, 0), coverage(0, 1, 0), coverage(0, 0, 1), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(1500)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"estimator": "elbo", "num_samples": 4}, "choose one of"),
        ({"estimator": "mask_count", "num_samples": 0}, "at least 1"),
        ({"estimator": "mask_count", "num_samples": 4, "num_diffusion_steps": 8}, "trajectory"),
        ({"estimator": "trajectory", "num_samples": 4, "num_diffusion_steps": 0}, "at least 1"),
        ({"estimator": "exact", "num_samples": 4, "length": MAX_EXACT_LENGTH + 1}, str(MAX_EXACT_LENGTH)),
    ],
)
def test_bad_settings_say_what_to_change(settings, word):
    arguments = {"length": 5, "key": KEY, **settings}
    with pytest.raises(UserError, match=word):
        draw_plan(arguments.pop("estimator"), **arguments)
