"""Compiled operators that environments share."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from diffdpo.engine import operator_cache
from diffdpo.engine.operator_cache import kept, operator_folder, use_kept
from diffdpo.errors import UserError

NAME = "xxhash._xxhash"


@pytest.fixture
def operator(tmp_path, monkeypatch):
    """A library as another environment has left it."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    found = importlib.util.find_spec(NAME)
    assert found is not None and found.origin is not None
    folder = operator_folder() / NAME
    folder.mkdir(parents=True)
    (folder / "build.ninja").write_text("of /another/environment")
    shutil.copyfile(found.origin, folder / f"{NAME}.so")
    os.utime(folder / "build.ninja", (0, 0))
    return folder / f"{NAME}.so", OpBuilder


def test_what_another_environment_has_compiled_is_loaded(operator):
    library, builder = operator
    assert kept(NAME) == library
    use_kept([NAME, "one_that_is_not_there"])
    assert builder._loaded_ops[NAME].__file__ == str(library)
    assert set(builder._loaded_ops) == {NAME}
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(operator_folder()), "what is compiled goes there too"


def test_one_that_cannot_be_loaded_is_compiled_anew(operator):
    library, builder = operator
    library.write_text("no library at all")
    use_kept([NAME])
    assert builder._loaded_ops == {} and not library.exists() and kept(NAME) is None


@pytest.mark.parametrize("length", [10, 100, -1], ids=["in the header", "after it", "by one byte"])
def test_one_that_is_too_short_is_compiled_anew(operator, length):
    """It is never loaded: to touch what is missing of it ends the process."""
    library, builder = operator
    library.write_bytes(library.read_bytes()[:length])
    assert kept(NAME) is None
    use_kept([NAME])
    assert builder._loaded_ops == {} and not library.exists(), "else ninja takes it for the result"


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: b"no library at all"])
def test_one_that_is_damaged_and_cannot_be_removed_is_a_line(operator, monkeypatch, damage):
    def read_only(path, missing_ok=False):
        raise OSError(30, "Read-only file system")

    library, _ = operator
    library.write_bytes(damage(library.read_bytes()))
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(
        UserError, match=r"damaged and cannot be removed \(Read-only file system\).*TORCH_EXTENSIONS_DIR"
    ):
        use_kept([NAME])


def test_one_that_another_process_works_on_is_left_to_torch_which_waits(operator):
    library, builder = operator
    library.write_bytes(library.read_bytes()[:100])  # half linked
    library.with_name("lock").touch()
    use_kept([NAME])
    assert builder._loaded_ops == {} and library.exists()


def test_one_older_than_its_instructions_was_cut_short(operator):
    library, _ = operator
    os.utime(library, (0, 0))
    os.utime(library.with_name("build.ninja"))
    assert kept(NAME) is None


@pytest.mark.parametrize("what", ["torch", "deepspeed", "processor", "device"])
def test_environments_that_differ_in_what_decides_have_other_folders(monkeypatch, what):
    before = operator_folder()
    with monkeypatch.context() as patch:
        if what == "torch":
            patch.setattr(torch, "__version__", "1.0")
        elif what == "deepspeed":
            patch.setattr(operator_cache, "version", lambda name: "0.1")
        elif what == "device":
            there = torch.cuda.is_available()
            patch.setattr(torch.cuda, "is_available", lambda: not there)
        else:
            patch.setattr(operator_cache, "_processor", lambda: "of another host")
        assert operator_folder() != before
    assert operator_folder() == before
