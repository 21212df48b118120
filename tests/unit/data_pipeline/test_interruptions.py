"""What stops a build from outside: Ctrl-C, kill -9, a full disk. Nothing half-made is accepted, and it can go on."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_pipeline.shard_builder as build_module
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.parallel import ordered_map
from data_pipeline.shard_builder import BuildOptions, build
from tests.support.paths import ROOT

ROWS = 8_000  # four chunks


@pytest.fixture
def source(tmp_path, jsonl, make_rows):
    return jsonl(tmp_path / "a.jsonl", make_rows(ROWS))


def start(source, out, *options, **kwargs):
    """``build`` in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "data_pipeline", "build", str(source), "--out", str(out), "--shard_size", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options], start_new_session=True, env=environment, **pipes, **kwargs)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def chunks(out):
    return list(out.with_name(f"{out.name}.building").glob("chunks/*.json"))


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def group_members(group):
    """Processes of a group that still run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(name))
    return found


@pytest.mark.parametrize(("workers", "number"), [("0", signal.SIGINT), ("2", signal.SIGINT), ("2", signal.SIGKILL)])
def test_ctrl_c_and_kill_9(source, tmp_path, workers, number):
    out = tmp_path / "out"
    # a test run in the background has Ctrl-C ignored, and children inherit that
    child = start(source, out, "--workers", workers, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: chunks(out))
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # a terminal sends it to all processes of the command
    else:
        child.kill()  # the one the user knows of
    stderr = child.communicate(timeout=120)[1]
    assert not out.exists(), "too fast to be interrupted: raise ROWS"
    with pytest.raises(DataError):
        open_dataset(str(out))
    wait_until(lambda: not group_members(child.pid))
    if number == signal.SIGINT:
        assert child.returncode == 130
        assert "Traceback" not in stderr
        assert "out.building: the same command goes on there" in stderr
    again = start(source, out, "--workers", "0")
    assert "8000 records in 8 shards" in again.communicate(timeout=120)[0]
    build([str(source)], tmp_path / "whole", BuildOptions(shard_size=1000))
    assert shards(out) == shards(tmp_path / "whole")
    assert not out.with_name("out.building").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_full_disk(source, tmp_path, workers):
    """A limit on the size of files stands in for it: the write fails half way."""
    out = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    child = start(source, out, "--workers", workers, preexec_fn=limit)
    stderr = child.communicate(timeout=120)[1]
    assert child.returncode == 2
    lines = [line for line in stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in stderr
    assert "the build stopped" in lines[0] and "out.building: the same command goes on there" in lines[0]
    assert not out.exists()
    done = chunks(out)
    assert done, "the chunks that fit are there"
    build([str(source)], tmp_path / "whole", BuildOptions(shard_size=1000))
    build([str(source)], out, BuildOptions(shard_size=1000))
    assert shards(out) == shards(tmp_path / "whole")


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ChildProcessError, match="killed, perhaps for want of memory"):
        list(ordered_map(die, range(4), workers=1))


def test_what_a_failed_build_leaves(tmp_path, jsonl, make_rows, monkeypatch):
    """Nothing when the input is to blame; the finished parts when the machine is, with a word about them."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "q"}\n')
    with pytest.raises(DataError, match="missing field"):
        build([str(bad)], tmp_path / "out", BuildOptions())
    assert not (tmp_path / "out.building").exists()

    def full(*_, **__):
        raise OSError("4096 requested and 0 written")  # what numpy says

    monkeypatch.setattr(build_module, "save_index", full)
    with pytest.raises(DataError, match=r"0 written \(is the disk full\?\); what is finished stays in .*out\.building"):
        build([str(jsonl(tmp_path / "a.jsonl", make_rows(3)))], tmp_path / "out", BuildOptions())
    monkeypatch.undo()
    assert build([str(tmp_path / "a.jsonl")], tmp_path / "out", BuildOptions())["num_records"] == 3


@pytest.mark.parametrize("out", ["", ".", ".."])
def test_out_must_have_a_name(tmp_path, jsonl, make_rows, monkeypatch, out):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(DataError, match="a name of its own"):
        build([str(jsonl(tmp_path / "a.jsonl", make_rows(3)))], out, BuildOptions())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "in"]
