"""Locks in the cache of torch's extensions: a living compilation's stays, a killed one's goes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from diffdpo.engine import locks

COMPILES = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "lock"


@pytest.fixture
def all_seen(monkeypatch):
    """As on a filesystem of this machine, whatever the tests run on."""
    monkeypatch.setattr(locks, "sees_who_took", lambda lock: True)


@pytest.fixture
def start():
    """``start(code, *arguments, cwd)``: a process that lives to the end of the test, or is killed by it."""
    started = []

    def start(code, *arguments, **options):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options))
        assert started[-1].stdout.readline() == "taken\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def aged(lock, seconds):
    lock.touch()
    os.utime(lock, (time.time() - seconds, time.time() - seconds))
    return lock


def test_the_lock_of_a_process_goes_when_it_is_killed(lock, start, all_seen):
    process = start(COMPILES, lock)
    aged(lock, seconds=7200)
    assert not locks.remove_if_abandoned(lock), "torch holds it open"
    process.kill()
    process.wait()
    assert locks.remove_if_abandoned(lock) and not lock.exists()


def test_a_compiler_that_goes_on_without_its_caller_counts(lock, start, all_seen):
    compiler = start("import time; print('taken', flush=True); time.sleep(60)", cwd=lock.parent)
    assert not locks.remove_if_abandoned(aged(lock, seconds=7200))
    compiler.kill()
    compiler.wait()
    assert locks.remove_if_abandoned(lock)


def test_where_others_cannot_be_seen_only_age_tells(lock, monkeypatch):
    monkeypatch.setattr(locks, "sees_who_took", lambda lock: False)
    assert not locks.remove_if_abandoned(aged(lock, seconds=600))
    assert locks.remove_if_abandoned(aged(lock, seconds=7200))


@pytest.mark.parametrize(
    ("mount", "namespace", "seen"),
    [
        (("/", "ext4"), locks.FIRST_PID_NAMESPACE, True),
        (("/home", "nfs4"), locks.FIRST_PID_NAMESPACE, False),
        (("/", "overlay"), "pid:[1]", True),  # of the container alone
        (("/root/.cache", "ext4"), "pid:[1]", False),  # perhaps of other containers too
    ],
)
def test_who_can_be_seen(mount, namespace, seen, lock, monkeypatch):
    monkeypatch.setattr(locks, "_mount_of", lambda folder: (locks.Path(mount[0]), mount[1]))
    monkeypatch.setattr(os, "readlink", lambda path: namespace)
    assert locks.sees_who_took(aged(lock, seconds=0)) is seen


def test_mount_points_are_read(tmp_path):
    place, kind = locks._mount_of(tmp_path)
    assert os.path.ismount(place) and tmp_path.resolve().is_relative_to(place) and kind
    assert locks._mount_of(locks.Path("/proc/self"))[1] == "proc"


def test_a_living_compilation_is_waited_for_and_told_of(lock, monkeypatch):
    monkeypatch.setattr(locks, "PAUSE_SECONDS", 0.01)
    aged(lock, seconds=60)
    said, taken = [], lock.open()

    def finish():
        assert lock.exists()
        lock.unlink()  # as torch does

    def say(text):
        said.append(text)
        threading.Timer(0.05, finish).start()

    locks.wait_for(lock, say)
    taken.close()
    assert len(said) == 1 and "waiting for a compilation begun 60 s ago" in said[0]


def test_what_is_abandoned_is_told_of(lock, all_seen):
    said = []
    locks.wait_for(aged(lock, seconds=300), said.append)
    assert said == [f"  removed {lock}: the process that took it 5 minutes ago must have been killed"]
    locks.wait_for(lock, said.append)
    assert len(said) == 1, "there is none any more"
