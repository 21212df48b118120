"""How many compilers run, how long that takes, and operators that are compiled at the same time."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from diffdpo.engine import operator_build
from diffdpo.engine.operator_build import at_once, compile_together, compilers, usual_seconds
from tests.support.paths import ROOT

TWO = ["cpu_adam", "deepspeed_shm_comm"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets cores, free bytes and, where there is one, the container's limit."""
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(operator_build, "CGROUP", tmp_path)

    def be(cores, free, limit="max"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        (tmp_path / "memory.max").write_text(str(limit))
        (tmp_path / "memory.current").write_text(str(10**9))

    return be


@pytest.mark.parametrize(
    ("cores", "free", "limit", "count"),
    [
        (8, 100 * 10**9, "max", 8),
        (8, 7 * 10**9, "max", 3),
        (8, 100 * 10**9, 5 * 10**9, 2),  # of which 1 is held
        (8, 10**9, "max", 1),
        (1, 100 * 10**9, "max", 1),
    ],
)
def test_as_many_compilers_as_cores_and_memory_allow(machine, monkeypatch, cores, free, limit, count):
    machine(cores, free, limit)
    assert compilers() == count
    monkeypatch.setenv("MAX_JOBS", "5")
    assert compilers() == 5, "who sets it is heard"
    monkeypatch.setenv("MAX_JOBS", "many")
    assert compilers() == count, "torch passes this over"


def test_how_long_it_takes_is_told_of_these_operators(machine):
    machine(2, 100 * 10**9)
    assert at_once(TWO) == 1 and usual_seconds(TWO) == 110, "one has work for two compilers"
    machine(4, 100 * 10**9)
    assert at_once(TWO) == 2 and usual_seconds(TWO) == 60
    assert at_once([*TWO, "async_io"]) == 2 and usual_seconds([*TWO, "async_io"]) == 150
    assert at_once(["cpu_adam"]) == 1 and usual_seconds(["cpu_adam"]) == 60


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """Operators whose compilers are scripts: each waits for the other, so that they must run at the same time."""
    (tmp_path / "diffdpo" / "engine").mkdir(parents=True)
    for folder in ("diffdpo", "diffdpo/engine"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "diffdpo/engine/operator_child.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1]).write_text(os.environ['MAX_JOBS'])\n"
        "end = time.monotonic() + 20\n"
        "while len(list(Path().glob('*_*'))) < 2 and time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(time.monotonic() >= end)\n"
    )
    monkeypatch.setattr(operator_build, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_are_compiled_at_the_same_time_where_there_are_cores_and_memory(machine, builders):
    machine(2, 100 * 10**9)
    compile_together(TWO)
    assert not list(builders.glob("*_*")), "DeepSpeed does it, one after another"
    machine(6, 100 * 10**9)
    start = time.monotonic()
    compile_together(TWO)
    assert time.monotonic() - start < 15, "none waited for the other's end"
    assert [(builders / name).read_text() for name in TWO] == ["3", "3"], "together no more than fit"


def test_one_that_fails_is_left_to_the_engine(machine, builders):
    machine(8, 100 * 10**9)
    (builders / "diffdpo/engine/operator_child.py").write_text("raise SystemExit('no such header')")
    compile_together(TWO)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_none_outlives_who_started_it(builders):
    (builders / "diffdpo/engine/operator_child.py").write_text("import time; time.sleep(60)")
    script = (
        "from pathlib import Path\nfrom diffdpo.engine import operator_build as it\n"
        f"it.ROOT = Path({str(builders)!r})\nit.compile_together({TWO})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MAX_JOBS": "4"}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, cwd=builders.parent
    )  # not where -m finds another
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.kill()
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert len(gone) == 2 and not alive
    finally:
        parent.kill()
        parent.wait()
        for child in children:
            if child.is_running():
                child.kill()
