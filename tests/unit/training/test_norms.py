"""What is told of gradients, and that one which is not finite spoils nothing."""

import math

import torch
from torch import nn

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.training.norms import ENOUGH, NormHistory


def test_a_norm_far_from_those_before_is_told_and_no_other():
    history = NormHistory()
    assert [history.add(1.0 + 0.1 * (i % 3)) for i in range(ENOUGH)] == [None] * ENOUGH
    assert history.add(9.0) is None
    assert round(history.add(55.0)) == 50
    assert NormHistory().add(1e9) is None, "with nothing to compare with nothing is far"


def test_a_step_that_is_not_finite_is_not_taken():
    engine = PlainEngine(nn.Linear(2, 1), World(0, 0, 1, torch.device("cpu")), OptimizerOptions(1e-2))
    engine.backward(engine(torch.ones(1, 2)).sum(), last=True)
    assert math.isfinite(engine.step(1e-2))
    before = [p.detach().clone() for p in engine.parameters]
    moments = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    engine.backward(engine(torch.tensor([[1.0, float("inf")]])).sum(), last=True)
    assert not math.isfinite(engine.step(1e-2))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.parameters, strict=True))
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, engine.optimizer.state.values(), strict=True))
    assert all(p.grad is None for p in engine.parameters), "nothing of it is left for the next step"
