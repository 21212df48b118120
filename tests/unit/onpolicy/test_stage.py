"""A stage of a round is a process that ends as it says, and that does not outlive who started it."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from diffdpo.errors import Stopped, TrainingError, UserError
from diffdpo.onpolicy import stage
from tests.support.paths import ROOT


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (3, Stopped), (1, TrainingError), (-9, TrainingError)])
def test_how_it_ends_is_handed_on(code, error, monkeypatch):
    script = f"import os, sys; os.kill(os.getpid(), {-code})" if code < 0 else f"import sys; sys.exit({code})"
    monkeypatch.setattr(stage, "command_of", lambda launcher: [sys.executable, "-c"])
    with pytest.raises(error, match=None if error is Stopped else "round 1, train"):
        stage.run_stage("round 1, train", [script], launcher=None)
    stage.run_stage("round 1, train", ["pass"], launcher=None)


def test_launchers_start_the_module():
    assert stage.command_of(None) == [sys.executable, "-m", "diffdpo"]
    assert stage.command_of("torchrun --nproc_per_node 8") == ["torchrun", "--nproc_per_node", "8", "-m", "diffdpo"]
    assert stage.command_of("deepspeed --num_gpus 2")[-2:] == ["--module", "diffdpo"]
    with pytest.raises(UserError, match="no_such_launcher"):
        stage.run_stage("x", ["train"], launcher="no_such_launcher")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_is_left_behind(sent):
    script = (
        "from diffdpo.onpolicy import stage\n"
        "stage.command_of = lambda launcher: ['sleep']\n"
        "stage.run_stage('x', ['60'], launcher=None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        children: list[psutil.Process] = []
        while not children and time.monotonic() < deadline:
            time.sleep(0.02)
            children = [c for c in psutil.Process(parent.pid).children() if c.name() == "sleep"]
        assert children
        parent.send_signal(sent)
        assert parent.wait(timeout=30) != 0
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert gone and not alive
    finally:
        parent.kill()
        for child in children:
            if child.is_running():
                child.kill()
