"""Bytes by part of what the engine holds, by numbers of weights."""

import json

import torch

from diffdpo.engine.held import held_bytes
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.memory.peak import GIB
from diffdpo.tracking.plots import plot_memory
from diffdpo.training.held_memory import HeldMemory
from tests.support.steps import WORLD


def engine_of(module: torch.nn.Module) -> PlainEngine:
    return PlainEngine(module, WORLD, OptimizerOptions(learning_rate=1e-3))


def test_each_tensor_is_counted_once_and_by_what_it_is():
    """100 trained numbers, 50 frozen ones and a second module of 150."""
    module = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 5, bias=False))
    module[1].requires_grad_(False)
    engine, reference = engine_of(module), torch.nn.Linear(10, 15, bias=False)
    held = HeldMemory(engine, reference)
    for _ in range(2):  # the second step is not counted
        module(torch.ones(1, 10)).sum().backward()
        engine.step(1e-3)
        held.on_step(1, None)
    step_count = 4  # bytes: AdamW counts the steps of each tensor
    expected = {"weights": 600, "reference": 600, "gradients": 400, "optimizer": 800 + step_count}
    assert held.bytes == {("device", part): size for part, size in expected.items()}
    assert held_bytes(engine, None).keys() == {("device", "weights"), ("device", "optimizer")}, "no gradients now"


def test_what_is_tied_is_one_storage():
    module = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    module[1].weight = module[0].weight
    assert held_bytes(engine_of(module), module) == {("device", "weights"): 400}


def test_parts_add_up_to_the_peak_and_are_drawn(tmp_path):
    held = HeldMemory(engine_of(torch.nn.Linear(2, 2)), None)
    held.bytes = {("device", "weights"): GIB, ("host", "optimizer"): 2 * GIB}
    gib = held.gib(3.0)
    assert gib == {"device": {"weights": 1.0, "other": 2.0}, "host": {"optimizer": 2.0}}
    assert plot_memory(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps({"held_memory_gib": gib}))
    assert plot_memory(tmp_path).read_bytes().startswith(b"\x89PNG")
