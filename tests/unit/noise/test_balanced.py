"""The construction of the balanced rows: strata, antithetic counts, layout."""

import numpy as np
import pytest

from diffdpo.noise.balanced import antithetic_signs, balanced_rows, layout


def test_layout_covers_first_and_masks_small_rows_where_a_large_one_does():
    masked_NS = layout(np.array([1, 2, 3, 5]), 6)
    np.testing.assert_array_equal(
        masked_NS.astype(int),
        [
            [0, 0, 0, 0, 1, 0],  # slots 2 to 5 are masked once; the next row took the first two of them
            [0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 1],  # the one that is left first
            [1, 1, 1, 1, 1, 0],
        ],
    )


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
        assert (weight[~masked] == 0).all()
        bound = np.concatenate([[0], np.cumsum(width)])
        sizes = masked.sum(1)
        assert (sizes >= np.floor(bound[:-1]) + (bound[:-1] == 0)).all() and (sizes <= np.ceil(bound[1:])).all()
