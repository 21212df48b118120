"""The construction of the balanced rows: strata, antithetic counts, pouring."""

import numpy as np
import pytest

from diffdpo.noise.balanced import antithetic_signs, balanced_rows, pour


def test_pour_levels_the_lowest_vessels():
    np.testing.assert_allclose(pour(np.array([0.0, 1.0, 4.0]), 3.0), [2.0, 1.0, 0.0])
    np.testing.assert_allclose(pour(np.array([0.0, 0.0]), 3.0), [1.5, 1.5])
    np.testing.assert_allclose(pour(np.array([2.0]), 0.5), [0.5])


@pytest.mark.parametrize("sizes", [[9.0, 1.0], [1.0, 9.0, 25.0, 49.0], [(2 * j + 1.0) ** 2 for j in range(8)]])
def test_antithetic_signs_cancel_as_far_as_the_largest_allows(sizes):
    sizes = np.array(sizes)
    signs = antithetic_signs(sizes)
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs @ sizes) <= max(2 * sizes.max() - sizes.sum(), sizes.max() / 2)


@pytest.mark.parametrize(("length", "num_rows"), [(1, 1), (1, 4), (5, 16), (64, 4), (301, 7)])
def test_rows_keep_their_promises(length, num_rows):
    for seed in range(10):
        masked, weight, width = balanced_rows(length, num_rows, np.random.default_rng(seed))
        assert width.sum() == pytest.approx(length)
        np.testing.assert_allclose(weight.sum(1), width)
        assert (weight >= 0).all() and (weight[~masked] == 0).all()
        bound = np.concatenate([[0], np.cumsum(width)])
        sizes = masked.sum(1)
        assert (sizes >= np.floor(bound[:-1]) + (bound[:-1] == 0)).all() and (sizes <= np.ceil(bound[1:])).all()


def test_totals_over_rows_are_nearly_level_with_enough_rows():
    totals = [balanced_rows(64, 8, np.random.default_rng(seed))[1].sum(0) for seed in range(50)]
    assert np.var(totals) < 0.12  # 0.59 = (H_64 - 1) / 8 for independent rows
