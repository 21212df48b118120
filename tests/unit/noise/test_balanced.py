"""The construction of the balanced rows: strata, antithetic counts, layout, and the mean of all they may be."""

import itertools
import math

import numpy as np
import pytest

from diffdpo.noise.balanced import BLOCK, PLAIN, antithetic_signs, balanced_rows, blocks, layout, strata
from diffdpo.noise.block_score import draw_block_plan
from diffdpo.noise.estimators import draw_plan
from diffdpo.noise.plan import NoiseKey


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


def test_layout_meets_every_set_of_a_size_before_one_again():
    masked_NS = layout(np.full(12, 2), 4)
    for start in (0, 6):
        assert len(np.unique(masked_NS[start : start + 6], axis=0)) == 6
    met_SS = masked_NS.T.astype(int) @ masked_NS
    assert (met_SS[~np.eye(4, dtype=bool)] == 2).all()


def test_layout_of_a_few_rows_goes_by_the_slots_order():
    """The default's rows, which runs and stored scores depend on, know nothing of who met whom."""
    assert layout(np.full(PLAIN, 2), 4).tolist() == [[True, True, False, False], [False, False, True, True]] * 2


@pytest.mark.parametrize("length", [5, 40])
def test_layout_masks_every_slot_equally_often_whatever_is_chosen_among_ties(length):
    k_N = np.sort(np.random.default_rng(0).integers(1, length + 1, 30))[::-1]
    for rows in range(1, 31):
        times_S = layout(k_N[:rows], length).sum(0)
        assert times_S.max() - times_S.min() <= 1


@pytest.mark.parametrize("num_rows", [1, 4, 16, 31, 32, 33, 47, 48, 4096])
def test_blocks_are_of_one_size_or_two(num_rows):
    size_G = blocks(num_rows)
    assert size_G.sum() == num_rows and size_G.max() - size_G.min() <= 1
    assert len(size_G) == 1 if num_rows < 2 * BLOCK else BLOCK <= size_G.min() <= size_G.max() < 2 * BLOCK


@pytest.mark.parametrize(("length", "num_rows"), [(1, 32), (5, 50), (9, 4 * BLOCK)])
def test_many_rows_are_independent_blocks_of_balanced_rows(length, num_rows):
    """Each at a uniform place, so the test of the mean of all rows below holds for all."""
    places, patterns = [], set()
    for draw in range(40):
        plan = draw_plan("balanced", length=length, num_samples=num_rows, key=NoiseKey(3, 1, "many", 0, draw))
        for g, size in enumerate(blocks(num_rows)):
            rows = plan.block_N == g
            assert rows.sum() == size
            place, scale_NS, width_N = found_place(length, plan.masked_NL[rows])
            assert sorted(scale_NS.T.tolist()) == sorted(plan.scale_NL[rows].T.tolist())  # but for the slots' order
            np.testing.assert_allclose(plan.weight_N[rows], size / num_rows)
            np.testing.assert_allclose(plan.share_N[rows], width_N * size / num_rows)
            places.append(place)
            patterns.add(plan.masked_NL[rows].tobytes())
    if length > 1:
        assert len(patterns) > 0.7 * len(places)  # of 5 tokens there are but 120 assignments
        assert abs(np.mean(places) - 0.5) < 4 / np.sqrt(12 * len(places))
        first = places[:: len(blocks(num_rows))], places[1 :: len(blocks(num_rows))]
        assert abs(np.corrcoef(*first)[0, 1]) < 4 / np.sqrt(40)


def found_place(length: int, masked_NL: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """A place whose rows have as many masked tokens as these, with their weights and widths."""
    for low, high in itertools.pairwise(cuts(length, len(masked_NL))):
        masked_NS, scale_NS, width_N = balanced_rows(length, len(masked_NL), (low + high) / 2)
        if (masked_NS.sum(1) == masked_NL.sum(1)).all():
            return (low + high) / 2, scale_NS, width_N
    raise AssertionError("no place gives these counts")


def test_a_block_draws_the_same_whatever_the_length_of_the_answer():
    """``paired``: the i-th tokens of answers of different lengths draw the same number in every block."""
    short, long = (draw_plan("paired", length=n, num_samples=64, key=NoiseKey(0, 0, "x", 0)) for n in (200, 204))
    other = draw_plan("paired", length=200, num_samples=64, key=NoiseKey(0, 0, "y", 0))
    for g in range(4):
        rows = short.block_N == g
        alike, by_chance = ((short.masked_NL == one.masked_NL[:, :200])[rows].mean() for one in (long, other))
        assert alike > 0.8 > by_chance + 0.1


@pytest.mark.parametrize("sizes", [[9.0, 1.0], [1.0, 9.0, 25.0, 49.0], [(2 * j + 1.0) ** 2 for j in range(8)]])
def test_antithetic_signs_cancel_as_far_as_the_largest_allows(sizes):
    sizes = np.array(sizes)
    signs = antithetic_signs(sizes)
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs @ sizes) <= max(2 * sizes.max() - sizes.sum(), sizes.max() / 2)


@pytest.mark.parametrize(("length", "num_rows"), [(1, 1), (1, 4), (5, 16), (64, 4), (301, 7)])
def test_rows_keep_their_promises(length, num_rows):
    for place in np.random.default_rng(0).random(10):
        masked, weight, width = balanced_rows(length, num_rows, place)
        assert width.sum() == pytest.approx(length)
        np.testing.assert_allclose(weight.sum(1), width)
        assert (weight[~masked] == 0).all()
        bound = np.concatenate([[0], np.cumsum(width)])
        sizes = masked.sum(1)
        assert (sizes >= np.floor(bound[:-1]) + (bound[:-1] == 0)).all() and (sizes <= np.ceil(bound[1:])).all()


def test_totals_over_rows_are_nearly_level_with_enough_rows():
    totals = [balanced_rows(64, 8, place)[1].sum(0) for place in np.random.default_rng(0).random(50)]
    assert np.var(totals) < 0.12  # 0.59 = (H_64 - 1) / 8 for independent rows


def cuts(length: int, num_rows: int) -> np.ndarray:
    """The places at which a row's count changes, 0 and 1 among them."""
    bound = strata(length, num_rows)
    width = np.diff(bound)
    cut = (np.arange(length + 1)[:, None] - bound[:-1]) / width
    cut = np.where(antithetic_signs(width**2) > 0, cut, 1 - cut)
    return np.unique(np.concatenate([[0.0, 1.0], cut[(cut > 0) & (cut < 1)]]))


def all_rows(length: int, num_rows: int):
    """(probability, masks, weights) of all that balanced_rows may give."""
    for low, high in itertools.pairwise(cuts(length, num_rows)):
        yield high - low, *balanced_rows(length, num_rows, (low + high) / 2)[:2]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 17])
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


def test_blocks_of_rows_stay_apart_in_every_block_of_tokens():
    """Of a block-causal family: rows are shifted within what was drawn together, or their spread were not the error."""
    plan = draw_block_plan("balanced", tokens=[5, 5, 3], num_samples=40, key=NoiseKey(0, 0, "x", 0))
    assert np.bincount(plan.block_N).tolist() == blocks(40).tolist()
    for columns in (slice(0, 5), slice(5, 10), slice(10, 13)):
        total_B = np.bincount(plan.block_N, plan.scale_NL[:, columns].sum(1))
        np.testing.assert_allclose(total_B, blocks(40) / 40 * (columns.stop - columns.start))
    assert (plan.masked_NL[:, :5].sum(0) != plan.masked_NL[:, 5:10].sum(0)).any()  # noise of its own
    few = draw_block_plan("balanced", tokens=[5, 5, 3], num_samples=8, key=NoiseKey(0, 0, "x", 0))
    assert few.block_N is None and few.cell_N is None
