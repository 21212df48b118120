"""Segments found by measuring, on a real engine."""

import pytest
import torch

from diffdpo.step import sizing
from diffdpo.step.choose import MicroBatchShape
from diffdpo.step.segments import Segments
from diffdpo.step.sizing import fit_segments, longest_rows, suggestion
from tests.unit.step.test_backward import batches, gradient, make_step  # noqa: F401

SHAPE = MicroBatchShape(pairs=8, rows_per_answer=2, max_length=60, whole_batch=False)


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


def test_segments_are_sized_and_the_step_is_the_same(tiny_model, batches, pretended):  # noqa: F811
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


def test_a_micro_batch_in_one_graph_is_suggested():
    fit = sizing.Fit(rows=17, budget=0, tried=((17, 0),))
    assert suggestion(fit, SHAPE, 2).startswith("--per_device_train_batch_size 4 --gradient_accumulation_steps 4 ")
    assert suggestion(sizing.Fit(32, 0, ((32, 0),)), SHAPE, 2) is None, "it fits as it is"
    assert suggestion(sizing.Fit(3, 0, ((3, 0),)), SHAPE, 2) is None, "not even a pair fits"
