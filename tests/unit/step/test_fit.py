"""Segments found by measuring, on a real engine."""

from dataclasses import replace

import pytest
import torch

from diffdpo.scores.segments import Segments
from diffdpo.step import fit as sizing
from diffdpo.step.fit import fit_micro_batch, fit_segments, longest_rows
from diffdpo.step.strategy import MicroBatchShape
from tests.support.steps import gradient, make_step

SHAPE = MicroBatchShape(pairs=8, rows_per_answer=2, max_length=60, couples_pairs=False)


@pytest.fixture
def pretended(monkeypatch):
    """Memory by rows: 100 bytes and 10 a row; a budget of 265."""
    sizes = []

    def peak_of(work, device):
        before = len(sizes)
        work()
        assert len(sizes) == before + 1, "one forward and backward a size"
        return 100 + 10 * sizes[-1]

    monkeypatch.setattr(sizing, "peak_of", peak_of)
    monkeypatch.setattr(sizing, "memory_budget", lambda *_, **__: 265)
    return sizes


def test_segments_are_sized_and_the_step_is_the_same(tiny_model, batches, pretended):
    expected, _ = gradient(make_step(tiny_model, "two_pass", 3), batches[:2])
    step = make_step(tiny_model, "two_pass", 3)
    forward = step.engine.module.forward
    step.engine.module.forward = lambda ids_RT, *rest: pretended.append(len(ids_RT)) or forward(ids_RT, *rest)
    fit = fit_segments(step.engine, step.segments, SHAPE, fraction=0.9)
    assert pretended == [1, 2, 4, 8, 16] and fit.rows == 16
    assert step.segments.describe() == f"up to {16 * 60} tokens a segment"
    found, _ = gradient(step, batches[:2])
    assert (found - expected).norm() / expected.norm() < 1e-5, "probes leave nothing in the gradient"
    assert "16 rows of 60 tokens" in fit.describe(60) and "1, 2, 4, 8, 16" in fit.describe(60)


def test_a_probe_that_runs_out_of_memory_is_too_much(tiny_model, pretended):
    step = make_step(tiny_model, "two_pass", 3)
    forward = step.engine.module.forward

    def greedy(ids_RT, *rest):
        pretended.append(len(ids_RT))
        return forward(ids_RT, *rest) if len(ids_RT) < 8 else torch.empty(2**60)

    step.engine.module.forward = greedy
    assert fit_segments(step.engine, Segments(), SHAPE, fraction=0.9).rows == 4


def test_the_longest_rows_are_all_scored():
    rows = longest_rows(3, 10)
    assert rows.input_ids_RT.shape == (3, 10) and len(rows.row_M) == 27
    assert torch.equal(rows.row_M, rows.row_M.sort().values) and int(rows.position_M.min()) == 1


def test_the_largest_micro_batch_in_one_graph():
    def chosen(rows: int, shape: MicroBatchShape = SHAPE, accumulation: int = 2) -> int:
        return fit_micro_batch(sizing.Fit(rows, 0, ((rows, 0),)), shape, accumulation)

    assert chosen(17) == 4, "a divisor of the step's 16 pairs, of 4 rows each"
    assert chosen(32) == 8, "it fits as it is"
    assert chosen(64) == 16, "larger than asked for"
    assert chosen(3) == 8, "not even a pair fits: as asked for"
    assert chosen(31, replace(SHAPE, pairs=6), 1) == 6 and chosen(20, replace(SHAPE, pairs=6), 1) == 3
    assert chosen(4, replace(SHAPE, couples_pairs=True)) == 8


def test_all_rows_of_a_step_are_tried(tiny_model, pretended, monkeypatch):
    monkeypatch.setattr(sizing, "memory_budget", lambda *_, **__: 10**6)
    step = make_step(tiny_model, "two_pass", 3)
    forward = step.engine.module.forward
    step.engine.module.forward = lambda ids_RT, *rest: pretended.append(len(ids_RT)) or forward(ids_RT, *rest)
    shape = replace(SHAPE, pairs=2, max_length=8)
    assert fit_segments(step.engine, step.segments, shape, fraction=0.9, accumulation=3).rows == 24
    assert fit_segments(step.engine, step.segments, shape, fraction=0.9).rows == 8


def test_not_even_a_row_is_told(tiny_model, pretended):
    for peak, said in ((300, "it takes 0.00 GiB"), (sizing.TOO_MUCH, "it ran out of memory")):
        fit = sizing.Fit(1, 265, ((1, peak),))
        assert not fit.fits and fit.describe(60).startswith("WARNING: not even one row of 60 tokens fits in 0.00 GiB")
        assert said in fit.describe(60) and "larger --max_memory" in fit.describe(60)
    assert sizing.Fit(1, 265, ((1, 110), (2, 300))).fits
