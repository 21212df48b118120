"""A step that was not finite taken again: which of its records are to blame, with which weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.training.culprit import Culprit, keep_culprit, keep_state
from diffdpo.training.replay import replay, share_of


def batch(*names: str):
    sides = [TokenAnswer(np.array([5, 6, 7]), 1), TokenAnswer(np.array([5, 8]), 1)]
    pairs = [TokenPair(name, *sides) if name else None for name in names]
    return collate(pairs, pad_id=0, epoch=1, step=4, micro=0, last_micro=True, records=tuple(range(len(names))))


class Engine:
    """Says which folder it has read."""

    def __init__(self):
        self.world, self.read = World(0, 0, 1, torch.device("cpu")), []

    def save(self, folder):
        (folder / "weights").write_text("")

    def load(self, folder):
        self.read.append(folder)


def step(micro_batches, rate):
    """A step with the record b is not finite."""
    bad = any("b" in each.ids for each in micro_batches)
    return SimpleNamespace(loss=float("nan") if bad else 0.5, grad_norm=1.0, rate=rate)


@pytest.fixture
def context():
    said: list[str] = []
    return SimpleNamespace(world=World(0, 0, 1, torch.device("cpu")), print=said.append, said=said)


def test_the_record_to_blame_is_marked_and_no_other(tmp_path, context):
    engine = Engine()
    report = SimpleNamespace(loss=float("nan"), grad_norm=2.0)
    path = keep_culprit(tmp_path, 7, report, 0.25, [batch("a", ""), batch("b", "c")], engine)
    keep_state(path, engine)
    whole = replay(path, context, engine, step, alone=True)
    assert engine.read == [tmp_path / "culprit-step-7"] and whole.rate == 0.25
    marked = [line.split()[0] for line in context.said if line.endswith("<- not finite")]
    assert marked == ["b"] and sum(line.startswith(("a ", "b ", "c ")) for line in context.said) == 3
    context.said.clear()
    replay(path, context, engine, step, alone=False)
    assert not any("<- not finite" in line for line in context.said), "of coupled pairs none has a loss of its own"


def test_micro_batches_go_to_as_many_processes_or_to_fewer():
    one, two = [batch("a")], [batch("b")]
    culprit = Culprit(1, 0.0, 0.0, 0.0, [one, two])

    def share(rank, size):
        found = share_of(culprit, SimpleNamespace(world=World(rank, rank, size, torch.device("cpu"))))
        return [each.ids for each in found]

    assert share(0, 1) == [("a",), ("b",)] and share(1, 2) == [("b",)]
    with pytest.raises(UserError, match="2 processes"):
        share(0, 3)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1, "step": 3}', "[1]"])
def test_a_file_that_is_no_culprit_is_one_line(tmp_path, context, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="--replay"):
        replay(tmp_path / "x.json", context, Engine(), step, alone=True)
