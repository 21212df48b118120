"""Signs of life: who hangs is named, and what takes its usual time is left alone."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from dataclasses import asdict, replace

import pytest
import torch

from diffdpo.engine.world import World
from diffdpo.errors import HUNG, TrainingError
from diffdpo.training.heartbeat import (
    FOLDER,
    STALE_SECONDS,
    WAITING,
    Pulse,
    Sign,
    beating,
    diagnosis,
    lost,
    read_signs,
    stage_of,
)
from tests.support.paths import ROOT

HERE = socket.gethostname()


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, torch.device("cpu"))


def sign(rank: int, stage: str = "backward", step: int = 5, waited: float = 130.0, age: float = 1.0, pid: int = 1):
    return Sign(rank, f"host{rank}", pid, stage, step, waited, age)


def test_the_limit_follows_the_usual_time(tmp_path):
    pulse = Pulse(world(), tmp_path, timeout=120.0)
    assert pulse.limit() == float("inf"), "what has not been done yet has no usual time"
    pulse.beat("step", 1)
    assert pulse.limit() == float("inf")
    pulse.times["step"] = deque([7.0, 10.0], maxlen=20)
    assert pulse.limit() == 150.0
    pulse.since = time.monotonic() - 149
    assert not pulse.is_late()
    pulse.since = time.monotonic() - 151
    assert pulse.is_late()


def test_a_silent_rank_is_a_hang_even_in_the_first_step(tmp_path):
    pulse = Pulse(world(0, 2), tmp_path, timeout=120.0, stage="step")
    for rank in (0, 1):
        pulse._write(sign(rank))
    assert not pulse.hears_nothing()
    old = time.time() - 121
    os.utime(tmp_path / FOLDER / "rank-1.json", (old, old))
    assert pulse.hears_nothing()


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ([sign(0), sign(1, age=200.0)], r"rank 1 on host1 .* no life for 200 s; it was in backward of step 5"),
        ([sign(0), sign(1, stage="data", step=4)], r"rank 1 on host1 .* has been in data of step 4 for 130 s"),
        ([sign(0), sign(1, stage="data")], r"rank 1 on host1 .* has been in data of step 5"),
        ([sign(0), sign(1)], r"all 2 ranks live and wait for one another for 130 s in step 5 .*links"),
        ([sign(0, stage=WAITING), sign(1, stage="forward")], r"rank 1 on host1 .* has been in forward of step 5"),
        ([sign(0), replace(sign(1), unreached=(0,))], r"rank 1 on host1 .* cannot reach rank 0 any more"),
        ([sign(0, stage="save")], r"rank 0 on host0 .* has been in save of step 5 for 130 s"),
    ],
)
def test_who_holds_the_others_up_is_named(signs, said):
    assert __import__("re").search(said, diagnosis(signs)), diagnosis(signs)


def test_a_rank_that_has_died_is_named_instead_of_a_backend_s_traceback(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    pulse = Pulse(world(0, 2), tmp_path, timeout=0.0)
    named = rf"rank 1 on {HERE} \(process {child.pid}\) ended in forward of step 3"
    with pytest.raises(TrainingError, match=named), beating(pulse):
        pulse._write(Sign(1, HERE, child.pid, "forward", 3, 0.1))
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="something else"), beating(Pulse(world(0, 1), tmp_path, 0.0)):
        raise RuntimeError("something else")


def test_the_living_are_not_lost(tmp_path):
    ours = Sign(0, HERE, os.getpid(), "data", 1, 0.0, age=999.0)
    assert lost([ours, sign(1, age=STALE_SECONDS - 1)]) == []
    assert lost([sign(1, age=STALE_SECONDS + 1)])[0].rank == 1, "on another host only its silence tells"


def test_signs_are_written_from_the_first_stage_on_and_go_at_the_end(tmp_path):
    with beating(Pulse(world(0, 2), tmp_path, timeout=60.0)) as pulse:
        time.sleep(1.5)
        assert not (tmp_path / FOLDER).exists(), "a mistake in the set-up leaves nothing behind"
        pulse.beat("step", 1)
        until = time.monotonic() + 30
        while not read_signs(tmp_path) and time.monotonic() < until:
            time.sleep(0.1)
        (found,) = read_signs(tmp_path)
        assert (found.rank, found.pid, found.step) == (0, os.getpid(), 1)
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(
    ("places", "stage"),
    [
        ((("/x/diffdpo/engine/plain.py", "backward"),), "backward"),
        ((("/x/diffdpo/engine/world.py", "barrier"),), WAITING),
        # every command is run by a function of data_pipeline, which makes no step a reading of data
        ((("/x/diffdpo/training/loop.py", "run"), ("/x/data_pipeline/cli.py", "exit_code")), None),
    ],
)
def test_the_stage_is_read_off_the_stack(places, stage):
    ready, done = threading.Event(), threading.Event()

    def wait():
        ready.set()
        done.wait()

    inner = wait
    for place, name in places:
        scope: dict = {"inner": inner}
        exec(compile(f"def {name}():\n    inner()\n", place, "exec"), scope)
        inner = scope[name]
    thread = threading.Thread(target=inner)
    thread.start()
    ready.wait()
    assert stage_of(thread.ident) == stage
    done.set()
    thread.join()


def test_a_hang_ends_the_process_with_a_line_and_its_stack(tmp_path):
    code = f"""
        import time, torch
        from collections import deque
        from pathlib import Path
        from diffdpo.engine.world import World
        from diffdpo.training.heartbeat import Pulse, beating
        pulse = Pulse(World(0, 0, 1, torch.device("cpu")), Path({str(tmp_path)!r}), timeout=1.0)
        with beating(pulse):
            pulse.times["step"] = deque([0.1])
            pulse.beat("step", 7)
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == HUNG
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "hung: rank 0 on" in line and "step of step 7" in line
    assert "in <module>" in (tmp_path / "hang-rank-0.txt").read_text()


def test_a_sign_that_is_just_being_written_is_passed_over(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank-0.json").write_text(json.dumps(asdict(sign(0)))[:20])
    assert read_signs(tmp_path) == []
