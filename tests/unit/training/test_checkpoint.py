"""Checkpoints on disk: which are kept, which is the newest sound one, and what is said of a damaged one."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdpo.engine.deepspeed_files import CheckpointFiles
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError, UserError
from diffdpo.training.checkpoint import (
    NEEDED,
    STATE,
    NotSaved,
    find_checkpoint,
    list_checkpoints,
    read_state,
    save_checkpoint,
    set_aside_after,
    told_if_unreadable,
    told_if_unwritable,
)
from diffdpo.training.manifest import MANIFEST, fault_of, files_of, read_manifest, sums_of_share, write_manifest

WORLD = World(0, 0, 1, torch.device("cpu"))
STATE_OF_A_RUN = {name: {} for name in NEEDED}
FILES = ("optimizer.safetensors", STATE, "weights.safetensors")


def make_engine(seed: int = 0) -> PlainEngine:
    torch.manual_seed(seed)
    return PlainEngine(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), WORLD, OptimizerOptions(1e-2))


def take_steps(engine: PlainEngine, count: int) -> None:
    for step in range(count):
        engine.backward(engine(torch.ones(1, 3) * (step + 1)).pow(2).sum(), last=True)
        engine.step(1e-2)


@pytest.fixture
def engine():
    return make_engine()


def save(engine, folder, step, keep=2):
    return save_checkpoint(folder, step, engine, STATE_OF_A_RUN | {"step": step}, keep=keep)


def find(name, folder, said=None):
    return find_checkpoint(str(name), folder, WORLD, (said if said is not None else []).append)


def steps(folder):
    return [read_state(path)["step"] for path in list_checkpoints(folder)]


def test_the_newest_are_kept_in_order_of_their_steps(engine, tmp_path):
    for step in (8, 9, 10, 11):
        save(engine, tmp_path, step)
    assert steps(tmp_path) == [10, 11] and find("latest", tmp_path).name == "step-11"


def test_a_run_that_goes_on_from_an_older_one_keeps_what_it_saves(engine, tmp_path):
    for step in (10, 20, 30):
        save(engine, tmp_path, step, keep=3)
    aside = set_aside_after(tmp_path, 10)
    assert [path.name for path in aside] == ["step-20.aside", "step-30.aside"]
    save(engine, tmp_path, 15)
    assert steps(tmp_path) == [10, 15] and find("latest", tmp_path).name == "step-15"
    assert all((path / STATE).exists() for path in aside), "given up is not deleted"
    assert set_aside_after(tmp_path, 15) == [] and all(path.exists() for path in aside)
    (later,) = set_aside_after(tmp_path, 10)
    assert later.name == "step-15.aside" and not any(path.exists() for path in aside), "one resume's are kept"


def test_what_is_saved_is_what_is_loaded(tmp_path):
    engine, other, whole = make_engine(), make_engine(seed=1), make_engine()
    take_steps(engine, 3)
    path = save(engine, tmp_path, 3)
    assert files_of(path) == sorted(FILES)
    other.load(path)
    for each in (other, whole):
        take_steps(each, 3 if each is whole else 0)
        take_steps(each, 4)
    for ours, expected in zip(other.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, expected), "weights, both moments and the count of steps"


def test_only_what_is_trained_is_saved_and_it_must_be_the_same(tmp_path):
    engine = make_engine()
    engine.module[0].requires_grad_(False)
    engine.parameters = [p for p in engine.module.parameters() if p.requires_grad]
    path = save(engine, tmp_path, 1)
    assert (path / "weights.safetensors").read_bytes().count(b"1.weight") == 1
    assert b"0.weight" not in (path / "weights.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"no weight 0\.bias, which is trained here"):
        make_engine().load(path)


def damages(path: Path):
    """Kinds of damage to one file."""
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    yield "one bit", lambda: path.write_bytes(flipped)
    yield "zeros", lambda: path.write_bytes(bytes(len(content)))
    yield "cut", lambda: path.write_bytes(content[:-1])
    yield "empty", lambda: path.write_bytes(b"")
    yield "deleted", path.unlink


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["one bit", "zeros", "cut", "empty", "deleted"])
def test_a_damaged_file_is_told_and_the_newest_sound_one_taken(engine, tmp_path, name, kind):
    for step in (1, 2):
        path = save(engine, tmp_path, step)
    dict(damages(path / name))[kind]()
    said: list[str] = []
    for meant in ("latest", "auto"):
        assert find(meant, tmp_path, said).name == "step-1"
    assert len(said) == 2 and name in said[0] and "is passed over" in said[0]
    with pytest.raises(UserError, match="resume from another checkpoint") as caught:
        find(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_checkpoint_and_a_whole_other_one_are_told(engine, tmp_path):
    first, second = save(engine, tmp_path, 1), None
    take_steps(engine, 1)
    second = save(engine, tmp_path, 2)
    shutil.copy(first / FILES[2], second / FILES[2])
    assert "checksum" in fault_of(second, WORLD)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(UserError, match="it holds step 1"):
        find(second, tmp_path)


def test_a_file_that_is_in_no_manifest_is_told(engine, tmp_path):
    path = save(engine, tmp_path, 1)
    (path / "more.pt").write_bytes(b"x")
    assert fault_of(path, WORLD) == "more.pt is in no manifest"


def test_where_none_is_sound_nothing_is_begun_anew(engine, tmp_path):
    (save(engine, tmp_path, 1) / MANIFEST).unlink()
    for meant in ("latest", "auto"):
        with pytest.raises(UserError, match="none of the 1 checkpoints"):
            find(meant, tmp_path)


def test_auto_starts_where_there_is_nothing(tmp_path):
    assert find("auto", tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        find("latest", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("content", ["", '{"step": 1', "[]", json.dumps({"step": 1})])
def test_a_state_of_another_version_is_named(engine, tmp_path, content):
    path = save(engine, tmp_path, 1)
    (path / STATE).write_text(content)
    with pytest.raises(UserError, match="damaged or of another version"):
        read_state(path)


def test_a_whole_checkpoint_of_another_version_is_passed_over(engine, tmp_path):
    for step in (2, 4):
        save(engine, tmp_path, step)
    newest = list_checkpoints(tmp_path)[-1]
    (newest / STATE).write_text(json.dumps({"step": 4}))
    write_manifest(newest, sums_of_share(newest, WORLD))
    assert find("auto", tmp_path).name == "step-2"


def test_a_failed_save_leaves_nothing_and_says_how_much_it_needs(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 1)

    def fail(folder):
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "save", fail)
    with pytest.raises(NotSaved, match=r"step-2.partial cannot .*No space left.*needs about .*free") as caught:
        save(engine, tmp_path, 2)
    assert caught.value.full and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_what_a_killed_save_left_is_removed(engine, tmp_path):
    left = tmp_path / "checkpoints" / "step-7.partial"
    left.mkdir(parents=True)
    save(engine, tmp_path, 9)
    assert not left.exists()


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    with pytest.raises(TrainingError, match=str(tmp_path)) as caught, told_if_unwritable(tmp_path):
        torch.save({"a": torch.ones(4)}, "/dev/full")
    assert "\n" not in str(caught.value)


def test_a_fault_of_another_kind_is_not_told_as_a_full_disk(tmp_path, engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, told_if_unwritable(tmp_path):
        fail()
    assert not isinstance(caught.value, TrainingError)
    monkeypatch.setattr(engine, "save", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        save(engine, tmp_path, 2)
    assert not isinstance(caught.value, TrainingError)


class Malicious:
    """Runs a command when a pickle of it is read."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return (Path.touch, (self.touched,))


def test_a_pickle_under_deepspeed_s_names_runs_nothing(tmp_path):
    torch.save({"module": {}, "trap": Malicious(tmp_path / "touched")}, tmp_path / "states.pt")
    pickle.loads(pickle.dumps(Malicious(tmp_path / "works")))
    assert (tmp_path / "works").exists(), "the trap must work for this test to mean anything"
    files = CheckpointFiles(None, nn.Linear(1, 1))
    with pytest.raises(UserError, match="cannot be read"), told_if_unreadable(tmp_path):
        files.load(str(tmp_path / "states.pt"))
    assert not (tmp_path / "touched").exists()


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    write_manifest(tmp_path, {})
    assert read_manifest(tmp_path) == {} and fault_of(tmp_path, WORLD) == "a is in no manifest"
    raw = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(raw.replace(b"\n", b" ", 1))
    with pytest.raises(ValueError, match="checksum"):
        read_manifest(tmp_path)
