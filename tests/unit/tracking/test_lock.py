"""One run, one folder: the lock dies with its holder."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.tracking.lock import FILE, is_held, one_run_in
from tests.support.paths import ROOT

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["a file", "run.lock is a folder", "run.lock points nowhere"])
def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        if kind.endswith("a folder"):
            (folder / FILE).mkdir()
        else:
            (folder / FILE).symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(UserError, match=f"{FILE} cannot be made there"), one_run_in(folder, WORLD):
        pass


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    code = f"""
        import time, torch
        from pathlib import Path
        from diffdpo.engine.world import World
        from diffdpo.tracking.lock import one_run_in
        with one_run_in(Path({str(tmp_path / "run")!r}), World(0, 0, 1, torch.device("cpu"))):
            print("held", flush=True)
            time.sleep(100)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives_and_not_after(holder, tmp_path):
    assert is_held(tmp_path / "run")
    refused = pytest.raises(UserError, match=rf"in use by a living run \(process {holder.pid} on")
    with refused as caught, one_run_in(tmp_path / "run", WORLD):
        raise AssertionError("two runs in one folder")
    assert "\n" not in str(caught.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not is_held(tmp_path / "run")
    with one_run_in(tmp_path / "run", WORLD):
        assert is_held(tmp_path / "run")


def test_what_was_made_for_the_lock_goes_with_it(tmp_path):
    with pytest.raises(UserError, match="a mistake"), one_run_in(tmp_path / "run", WORLD):
        raise UserError("a mistake")
    assert not (tmp_path / "run").exists()
    with one_run_in(tmp_path / "run", WORLD):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / FILE).exists()
