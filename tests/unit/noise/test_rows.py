"""NoisyRows: masks where they belong, the same noise in every batch composition, segments, absent sides."""

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.estimators import ESTIMATORS
from diffdpo.noise.rows import NoisyRows, alike, noisy_rows

MASK = 99
SAMPLED = [name for name in ESTIMATORS if name != "exact"]


def answer(prompt: int, length: int, start: int = 1) -> TokenAnswer:
    return TokenAnswer(np.arange(start, start + prompt + length, dtype=np.int32), prompt)


def pair(name: str, prompt: int, chosen: int | None, rejected: int | None) -> TokenPair:
    sides = [
        None if length is None else answer(prompt, length, start) for length, start in ((chosen, 1), (rejected, 40))
    ]
    return TokenPair(name, *sides)


def batch_of(*pairs, epoch=0):
    return collate(list(pairs), pad_id=0, epoch=epoch, step=0, micro=0, last_micro=True)


def rows_of(*pairs, estimator="mask_count_mirror", num_samples=4, **options) -> NoisyRows:
    settings = {"seed": 5, "mask_token_id": MASK, **options}
    return noisy_rows(batch_of(*pairs), estimator=estimator, num_samples=num_samples, **settings)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_only_answers_are_masked_and_targets_are_what_was_masked(estimator):
    batch = batch_of(pair("a", 3, 5, 9), pair("b", 6, 1, 2))
    rows = noisy_rows(batch, estimator=estimator, num_samples=3, seed=5, mask_token_id=MASK)
    assert len(rows) == 2 * 2 * 3 and rows.num_answers == 4
    clean_A = batch.input_ids_B2T.flatten(0, 1)
    for r, a in enumerate(rows.answer_R.tolist()):
        row, clean, length = rows.input_ids_RT[r], clean_A[a], int(rows.lengths_R[r])
        prompt = int(batch.prompt_lengths_B2.flatten()[a])
        assert length == int(batch.lengths_B2.flatten()[a])
        masked = row[:length] == MASK
        assert not masked[:prompt].any()
        assert torch.equal(row[:length][~masked], clean[:length][~masked])
        scored = rows.position_M[rows.row_M == r]
        assert masked[scored].all()
        assert torch.equal(clean[scored], rows.target_M[rows.row_M == r])
        if estimator != "trajectory":
            assert len(scored) == int(masked.sum())


@pytest.mark.parametrize("estimator", SAMPLED)
def test_rows_do_not_depend_on_batch_composition(estimator):
    """So neither on the micro-batch size, nor on which rank a pair falls to."""
    pairs = [pair("a", 3, 5, 9), pair("b", 6, 30, 2), pair("c", 1, 1, 1)]
    together = rows_of(*pairs, estimator=estimator)
    alone = [rows_of(one, estimator=estimator) for one in pairs]
    for b, rows in enumerate(alone):
        part = together.taken(torch.arange(8 * b, 8 * (b + 1)))
        for name in ("input_ids_RT", "lengths_R", "weight_R", "row_M", "position_M", "target_M", "scale_M"):
            assert torch.equal(getattr(part, name), getattr(rows, name)), name


def test_noise_changes_with_epoch_and_draw_and_seed():
    one = pair("a", 2, 40, 40)
    base = rows_of(one).input_ids_RT
    assert not torch.equal(base, rows_of(one, draw=1).input_ids_RT)
    assert not torch.equal(base, rows_of(one, seed=6).input_ids_RT)
    later = noisy_rows(batch_of(one, epoch=1), estimator="mask_count_mirror", num_samples=4, seed=5, mask_token_id=MASK)
    assert not torch.equal(base, later.input_ids_RT)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_absent_sides_keep_the_row_count_and_score_nothing(estimator):
    rows = rows_of(pair("a", 3, 5, None), None, pair("c", 3, None, 4), estimator=estimator)
    assert len(rows) == 3 * 2 * 4
    assert rows.tokens_A.tolist() == [5, 0, 0, 0, 0, 4]
    absent = torch.isin(rows.answer_R, torch.tensor([1, 2, 3, 4]))
    assert (rows.lengths_R[absent] == 1).all()
    assert (rows.weight_R[absent] == 0).all()
    assert not torch.isin(rows.answer_R[rows.row_M], torch.tensor([1, 2, 3, 4])).any()


def test_exact_has_all_masks_of_each_answer():
    rows = rows_of(pair("a", 2, 3, 4), pair("b", 2, 1, None), estimator="exact")
    assert torch.bincount(rows.answer_R).tolist() == [7, 15, 1, 1]


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_segments_partition_the_rows(size):
    rows = rows_of(pair("a", 3, 5, 9), pair("b", 6, 30, 2))
    parts = [rows.taken(torch.arange(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    assert sum(len(part) for part in parts) == len(rows)
    assert torch.equal(torch.cat([part.target_M for part in parts]), rows.target_M)
    for start, part in zip(range(0, len(rows), size), parts, strict=True):
        assert part.input_ids_RT.shape[1] == int(part.lengths_R.max())
        assert torch.equal(part.row_M + start, rows.row_M[(rows.row_M >= start) & (rows.row_M < start + size)])
        assert (part.input_ids_RT[part.row_M, part.position_M] == MASK).all()


def test_moved_rows_are_equal():
    rows = rows_of(pair("a", 3, 5, 9))
    moved = rows.to("cpu")
    assert torch.equal(moved.input_ids_RT, rows.input_ids_RT) and moved.num_answers == rows.num_answers


def masks_of(rows: NoisyRows, answers: int) -> list[torch.Tensor]:
    """Masked or not, for each row of each answer, the prompt of 2 tokens left out."""
    masked = rows.input_ids_RT == MASK
    return [masked[rows.answer_R == a][:, 2 : int(rows.lengths_R[rows.answer_R == a][0])] for a in range(answers)]


@pytest.mark.parametrize(("differ", "shared"), [(1, True), (20, True), (21, False), (40, False)])
def test_balanced_masks_both_sides_alike_where_they_mostly_agree(differ, shared):
    """At equal places up to half of the longer answer; the mean of h needs each side's mean only."""
    chosen, rejected = answer(2, 40), answer(2, 40)
    rejected.ids[2 : 2 + differ] += 50
    one, other = TokenPair("a", chosen, rejected), pair("b", 2, 40, 40)
    first, second, third, fourth = masks_of(rows_of(one, other, estimator="balanced"), 4)
    assert torch.equal(first, second) is shared
    assert not torch.equal(third, fourth) and not torch.equal(first, third)
    first, second = masks_of(rows_of(one, estimator="mask_count_mirror"), 2)
    assert not torch.equal(first, second)


def test_alike_counts_places_of_the_longer_answer():
    whole = np.arange(10)
    assert alike(whole, whole[:5]) and not alike(whole, whole[:4]) and not alike(whole, whole + 1)
    assert not alike(whole, whole[:0]) and not alike(whole[:0], whole[:0])
