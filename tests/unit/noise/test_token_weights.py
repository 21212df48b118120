"""Token weights against the constrained least-squares problem written out, and against other weights."""

import numpy as np
import pytest

from diffdpo.noise.balanced import balanced_rows
from diffdpo.noise.estimators import mask_count
from diffdpo.noise.token_weights import MEAN, NOISE, TOKEN, token_weights


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
    weight_NS = token_weights(masked_NS, total_N)
    np.testing.assert_allclose(weight_NS[masked_NS], solution[: len(row_M)], atol=1e-9)
    assert (weight_NS[~masked_NS] == 0).all()


def test_no_other_weights_of_the_same_totals_have_less_variance():
    rng = np.random.default_rng(0)
    masked_NS, weight_NS, total_N = balanced_rows(40, 4, rng.random())
    np.testing.assert_allclose(weight_NS.sum(1), total_N)
    least = error_variance(masked_NS, weight_NS)
    for _ in range(20):
        step_NS = np.where(masked_NS, rng.normal(size=masked_NS.shape), 0.0)
        step_NS -= masked_NS * (step_NS.sum(1) / masked_NS.sum(1))[:, None]
        assert error_variance(masked_NS, weight_NS + 1e-3 * step_NS) > least
        assert error_variance(masked_NS, weight_NS - 1e-3 * step_NS) > least


def test_balanced_rows_leave_a_fraction_of_the_error_of_independent_ones():
    def of_independent(rng: np.random.Generator) -> float:
        plan = mask_count(64, 4, rng)
        return error_variance(plan.masked_NL, plan.masked_NL * plan.weight_N[:, None])

    balanced = [error_variance(*balanced_rows(64, 4, place)[:2]) for place in np.random.default_rng(0).random(100)]
    independent = [of_independent(np.random.default_rng(seed)) for seed in range(100)]
    # 0.36; with even weights in the same masks 0.47
    assert np.mean(balanced) < 0.4 * np.mean(independent)
