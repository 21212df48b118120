"""Checkpoints on disk: which are kept, which is the latest, and what a damaged one says."""

import json

import pytest
import torch

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError, UserError
from diffdpo.training.checkpoint import (
    NEEDED,
    STATE,
    find_checkpoint,
    list_checkpoints,
    read_state,
    save_checkpoint,
    set_aside_after,
    told_if_unreadable,
    told_if_unwritable,
)

STATE_OF_A_RUN = {name: {} for name in NEEDED}


@pytest.fixture
def engine():
    return PlainEngine(torch.nn.Linear(2, 2), World(0, 0, 1, torch.device("cpu")), OptimizerOptions(1e-3))


def save(engine, folder, step, keep=2):
    return save_checkpoint(folder, step, engine, STATE_OF_A_RUN | {"step": step}, keep=keep)


def steps(folder):
    return [read_state(path)["step"] for path in list_checkpoints(folder)]


def test_the_newest_are_kept_in_order_of_their_steps(engine, tmp_path):
    for step in (8, 9, 10, 11):
        save(engine, tmp_path, step)
    assert steps(tmp_path) == [10, 11] and find_checkpoint("latest", tmp_path).name == "step-11"


def test_a_run_that_goes_on_from_an_older_one_keeps_what_it_saves(engine, tmp_path):
    for step in (10, 20, 30):
        save(engine, tmp_path, step, keep=3)
    aside = set_aside_after(tmp_path, 10)
    assert [path.name for path in aside] == ["step-20.aside", "step-30.aside"]
    save(engine, tmp_path, 15)
    assert steps(tmp_path) == [10, 15] and find_checkpoint("latest", tmp_path).name == "step-15"
    assert all((path / STATE).exists() for path in aside), "given up is not deleted"


@pytest.mark.parametrize("content", ["", '{"step": 1', "[]", json.dumps({"step": 1})])
def test_a_damaged_state_is_named(engine, tmp_path, content):
    path = save(engine, tmp_path, 1)
    (path / STATE).write_text(content)
    with pytest.raises(UserError, match="damaged or of another version"):
        read_state(path)


@pytest.mark.parametrize("size", [0, 100])
def test_a_torn_engine_file_is_named(engine, tmp_path, size):
    path = save(engine, tmp_path, 1)
    whole = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(whole[:size])
    with pytest.raises(UserError, match="resume from another checkpoint"), told_if_unreadable(path):
        engine.load(path)


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    with pytest.raises(TrainingError, match=str(tmp_path)) as caught, told_if_unwritable(tmp_path):
        torch.save({"a": torch.ones(4)}, "/dev/full")
    assert "\n" not in str(caught.value)
