"""The construction of the balanced rows: strata, antithetic counts, layout, and the mean of all they may be."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from diffdpo.noise.balanced import antithetic_signs, balanced_rows, layout, strata


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


def test_totals_over_rows_are_nearly_level_with_enough_rows():
    totals = [balanced_rows(64, 8, np.random.default_rng(seed))[1].sum(0) for seed in range(50)]
    assert np.var(totals) < 0.12  # 0.59 = (H_64 - 1) / 8 for independent rows


@dataclass
class Place:
    """Stands for the generator, of which balanced_rows asks one number."""

    place: float

    def random(self) -> float:
        return self.place


def all_rows(length: int, num_rows: int):
    """(probability, masks, weights) of all that balanced_rows may give: sizes change at finitely many places."""
    bound = strata(length, num_rows)
    width = np.diff(bound)
    cut = (np.arange(length + 1)[:, None] - bound[:-1]) / width
    cut = np.where(antithetic_signs(width**2) > 0, cut, 1 - cut)
    places = np.unique(np.concatenate([[0.0, 1.0], cut[(cut > 0) & (cut < 1)]]))
    for low, high in itertools.pairwise(places):
        yield high - low, *balanced_rows(length, num_rows, Place((low + high) / 2))[:2]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7])
def test_the_mean_over_all_places_and_permutations_is_the_score(length, num_rows):
    """For arbitrary token log-probabilities in every mask, without any sampling."""
    logp_mL = np.random.default_rng(length).normal(size=(2**length, length))
    bits_L = 1 << np.arange(length)
    permutations_PL = np.array(list(itertools.permutations(range(length))))
    found = 0.0
    for probability, masked_NS, weight_NS in all_rows(length, num_rows):
        masked_NPL, weight_NPL = masked_NS[:, permutations_PL], weight_NS[:, permutations_PL]
        found += probability * (weight_NPL * logp_mL[(masked_NPL * bits_L).sum(-1)]).sum((0, 2)).mean()
    masks = np.arange(1, 2**length)
    masked_mL = (masks[:, None] & bits_L) > 0
    size_m = masked_mL.sum(1)
    each_m = (masked_mL * logp_mL[masks]).sum(1) / (size_m * np.array([math.comb(length, k) for k in size_m]))
    assert found == pytest.approx(each_m.sum(), abs=1e-9)
