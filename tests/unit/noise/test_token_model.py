"""The token model: weights against a constrained least-squares problem written out, coupling against simulation."""

import numpy as np
import pytest

from diffdpo.noise.balanced import balanced_rows
from diffdpo.noise.estimators import mask_count
from diffdpo.noise.token_model import MEAN, NOISE, TOKEN, best_weights, coupling


def error_variance(masked_NS: np.ndarray, weight_NS: np.ndarray) -> float:
    """Of Σ w x against Σ_i E_u[x_i], token by token, from the definition of the model."""
    u_N = masked_NS.mean(1)
    features_N2 = np.stack([np.ones_like(u_N), u_N**2], 1)
    short_S2 = weight_NS.T @ features_N2 - MEAN
    return np.einsum("sa,ab,sb->", short_S2, TOKEN, short_S2) + (weight_NS**2).sum(1) @ (NOISE * u_N)


@pytest.mark.parametrize(("length", "num_rows"), [(1, 1), (1, 3), (6, 4), (20, 3), (9, 12)])
def test_weights_solve_the_constrained_problem(length, num_rows):
    """Against the same quadratic problem with one unknown for every masked slot, solved densely."""
    rng = np.random.default_rng(length)
    masked_NS = rng.random((num_rows, length)) < 0.6
    masked_NS[np.arange(num_rows), rng.integers(length, size=num_rows)] = True
    total_N = rng.random(num_rows) + 0.5
    row_M, slot_M = np.nonzero(masked_NS)
    u_N = masked_NS.mean(1)
    features_M2 = np.stack([np.ones(len(row_M)), u_N[row_M] ** 2], 1)
    quadratic_MM = (slot_M[:, None] == slot_M) * (features_M2 @ TOKEN @ features_M2.T) + np.diag(NOISE * u_N[row_M])
    constraint_NM = (np.arange(num_rows)[:, None] == row_M).astype(float)
    system = np.block([[quadratic_MM, constraint_NM.T], [constraint_NM, np.zeros((num_rows, num_rows))]])
    solution = np.linalg.solve(system, np.concatenate([features_M2 @ TOKEN @ MEAN, total_N]))
    weight_NS = best_weights(masked_NS, total_N)
    np.testing.assert_allclose(weight_NS[masked_NS], solution[: len(row_M)], atol=1e-9)
    assert (weight_NS[~masked_NS] == 0).all()


def test_no_other_weights_of_the_same_totals_have_less_variance():
    rng = np.random.default_rng(0)
    masked_NS, weight_NS, total_N = balanced_rows(40, 4, rng)
    np.testing.assert_allclose(weight_NS.sum(1), total_N)
    least = error_variance(masked_NS, weight_NS)
    for _ in range(20):
        step_NS = np.where(masked_NS, rng.normal(size=masked_NS.shape), 0.0)
        step_NS -= masked_NS * (step_NS.sum(1) / masked_NS.sum(1))[:, None]
        assert error_variance(masked_NS, weight_NS + 0.1 * step_NS) > least


def test_balanced_rows_leave_a_fraction_of_the_error_of_independent_ones():
    def of_independent(rng: np.random.Generator) -> float:
        plan = mask_count(64, 4, rng)
        return error_variance(plan.masked_NL, plan.masked_NL * plan.weight_N[:, None])

    balanced = [error_variance(*balanced_rows(64, 4, np.random.default_rng(seed))[:2]) for seed in range(100)]
    independent = [of_independent(np.random.default_rng(seed)) for seed in range(100)]
    assert np.mean(balanced) < 0.5 * np.mean(independent)


@pytest.mark.parametrize(("length", "num_rows"), [(12, 2), (40, 4), (16, 9)])
def test_coupling_is_what_simulation_finds(length, num_rows):
    rng = np.random.default_rng(3)
    masked_NS, weight_NS, total_N = balanced_rows(length, num_rows, rng)
    u_N, share_N = masked_NS.mean(1), total_N / total_N.sum()
    token_S2 = rng.multivariate_normal([0.0, 0.0], TOKEN, length)
    token_S2 = (token_S2 - token_S2.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(token_S2.T, ddof=1))).T
    token_S2 = token_S2 @ np.linalg.cholesky(TOKEN).T  # of exactly the model's covariance
    estimates, suggested = [], []
    for _ in range(40_000):
        own_S2 = token_S2[rng.permutation(length)]
        noise_NS = rng.normal(size=masked_NS.shape) * np.sqrt(NOISE * u_N)[:, None]
        sum_N = (weight_NS * (own_S2[:, 0] + np.outer(u_N**2, own_S2[:, 1]) + noise_NS)).sum(1)
        apart_N = sum_N / share_N
        spread = share_N @ (apart_N - share_N @ apart_N) ** 2
        estimates.append(sum_N.sum())
        suggested.append(spread * (share_N @ share_N) / (1 - share_N @ share_N))
    assert coupling(masked_NS, weight_NS) == pytest.approx(np.var(estimates) / np.mean(suggested), rel=0.04)


def test_a_single_row_and_a_single_token_have_no_coupling_to_speak_of():
    assert coupling(np.ones((1, 5), bool), np.full((1, 5), 1.0)) == 1.0
    assert coupling(np.ones((2, 1), bool), np.full((2, 1), 0.5)) == pytest.approx(1.0)
