"""What is looked at before a run begins: room on the disk."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffdpo.config import TrainConfig
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.training.checkpoint import planned_bytes
from diffdpo.training.room import check_room

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def engine():
    return PlainEngine(nn.Linear(100, 100), WORLD, OptimizerOptions(1e-2))


@pytest.fixture
def place(tmp_path):
    said: list[str] = []
    return SimpleNamespace(output_dir=tmp_path / "run", print=said.append, said=said)


def free(monkeypatch, size: int) -> None:
    monkeypatch.setattr("diffdpo.training.room.shutil.disk_usage", lambda path: SimpleNamespace(free=size))


@pytest.mark.parametrize(("keep", "there"), [(1, 0), (3, 0), (3, 2), (2, 5)])
def test_room_for_what_is_kept_one_in_writing_and_the_model(engine, place, monkeypatch, keep, there):
    one, weights = planned_bytes(engine), 4 * 100 * 101
    assert one == 12 * 100 * 101
    for step in range(there):
        (place.output_dir / "checkpoints" / f"step-{step}").mkdir(parents=True)
    needed = max(1, keep + 1 - there) * one + weights
    config = TrainConfig(save_total_limit=keep)
    free(monkeypatch, needed)
    check_room(config, place, engine)
    free(monkeypatch, needed - 1)
    with pytest.raises(UserError, match="--save_total_limit"):
        check_room(config, place, engine)
    assert place.said == []
    check_room(TrainConfig(save_total_limit=keep, save_on_full_disk="continue"), place, engine)
    assert len(place.said) == 1 and place.said[0].startswith("WARNING")
