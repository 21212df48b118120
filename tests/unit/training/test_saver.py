"""Checkpoints beside the steps: of the moment they were asked for, and told when they are whole or could not be."""

import threading
import time

import pytest
import torch
from torch import nn

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.training.checkpoint import NEEDED, NotSaved, list_checkpoints
from diffdpo.training.manifest import fault_of
from diffdpo.training.saver import Saver

WORLD = World(0, 0, 1, torch.device("cpu"))
STATE = {name: {} for name in NEEDED}


def make_engine(width: int = 3) -> PlainEngine:
    torch.manual_seed(0)
    return PlainEngine(nn.Linear(width, width), WORLD, OptimizerOptions(1e-2))


def take_step(engine: PlainEngine) -> None:
    engine.backward(engine(torch.ones(1, engine.module.in_features)).pow(2).sum(), last=True)
    engine.step(1e-2)


class Told:
    """What a saver has said."""

    def __init__(self, tmp_path, engine, keep=2):
        self.saved, self.failed = [], []
        self.saver = Saver(
            tmp_path,
            engine,
            keep,
            lambda step, path: self.saved.append((step, path.name)),
            lambda step, error: self.failed.append((step, error)),
        )


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    engine, go = make_engine(), threading.Event()
    take_step(engine)
    told, snapshot = Told(tmp_path, engine), engine.snapshot

    def slow_snapshot(beside):
        write = snapshot(beside)
        return lambda folder: go.wait(30) and write(folder)

    monkeypatch.setattr(engine, "snapshot", slow_snapshot)
    expected = [p.detach().clone() for p in engine.parameters]
    told.saver.save(1, STATE | {"step": 1}, wait=False)
    take_step(engine)
    assert not told.saver.is_done() and told.saved == [] and list_checkpoints(tmp_path) == []
    go.set()
    told.saver.settle()
    assert told.saved == [(1, "step-1")] and told.failed == []
    (path,) = list_checkpoints(tmp_path)
    assert fault_of(path, WORLD) is None
    engine.load(path)
    assert all(torch.equal(a, b) for a, b in zip(expected, engine.parameters, strict=True))


def test_the_next_save_waits_for_the_one_before_and_the_last_is_whole_at_once(tmp_path):
    engine = make_engine()
    told = Told(tmp_path, engine)
    for step in (1, 2, 3):
        take_step(engine)
        told.saver.save(step, STATE | {"step": step}, wait=step == 3)
    assert told.saved == [(1, "step-1"), (2, "step-2"), (3, "step-3")]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug")])
def test_what_the_thread_could_not_write_is_told_when_it_is_settled(tmp_path, monkeypatch, error):
    engine = make_engine()
    told = Told(tmp_path, engine)

    def failing(folder):
        raise error

    monkeypatch.setattr(engine, "snapshot", lambda beside: failing)
    told.saver.save(1, STATE | {"step": 1}, wait=False)
    told.saver.settle()
    ((step, failure),) = told.failed
    assert step == 1 and isinstance(failure, NotSaved) and failure.full is isinstance(error, OSError)
    assert told.saved == [] and list_checkpoints(tmp_path) == []


def test_the_step_waits_a_small_share_of_the_save(tmp_path):
    """Where the device is the host the copy is all that is waited for."""
    engine = make_engine(1500)  # 2.25 M weights: 27 MB of state
    take_step(engine)
    told = Told(tmp_path, engine)
    engine.snapshot(WORLD)  # memory is taken from the system once
    began = time.monotonic()
    told.saver.save(1, STATE | {"step": 1}, wait=True)
    whole = time.monotonic() - began
    began = time.monotonic()
    told.saver.save(2, STATE | {"step": 2}, wait=False)
    waited = time.monotonic() - began
    told.saver.settle()
    print(f"{waited:.3f} s of {whole:.3f} s")
    assert waited < 0.5 * whole, "a tenth on an idle machine; this one may be loaded"


def test_without_memory_for_a_copy_it_is_saved_in_the_step(tmp_path, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr("diffdpo.engine.saved.SNAPSHOT_SHARE", 0.0)
    take_step(engine)
    told = Told(tmp_path, engine)
    told.saver.save(1, STATE | {"step": 1}, wait=False)
    assert told.saver.step is None and told.saved == [(1, "step-1")]
