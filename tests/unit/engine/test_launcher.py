"""A launcher that has died is noticed; a shell is none."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffdpo.engine.launcher import is_left_alone, watch_launcher
from tests.support.paths import ROOT

LAUNCHER = """
import os, subprocess, sys, time
# as torchrun's command line reads: torch.distributed.run
env = {**os.environ, **({"LOCAL_RANK": "0", "WORLD_SIZE": "1"} if sys.argv[2] == "launches" else {})}
child = subprocess.Popen([sys.executable, sys.argv[1], "watcher"], env=env)
print(child.pid, flush=True)
time.sleep(100)
"""
WATCHER = """
import sys, time
from diffdpo.engine.launcher import launchers, watch_launcher
gone = []
watch_launcher(gone.append)
open(sys.argv[0] + ".ready", "w").write(str(len(launchers())))
for _ in range(80):
    time.sleep(0.1)
    if gone:
        open(sys.argv[0] + ".gone", "w").write(gone[0])
        break
"""


class Above:
    """As psutil tells of a process."""

    def __init__(self, pid: int, name: str, line: list[str] | None = None, parent: "Above | None" = None):
        self.pid, self.name, self.line = pid, lambda: name, line or [name]
        self.exe, self.cmdline, self.parent = lambda: f"/usr/bin/{name}", lambda: self.line, lambda: parent


def launched(tmp_path, how: str) -> tuple[str, bool]:
    """(how many launchers it saw, whether it noticed their death)."""
    (tmp_path / "torch.distributed.py").write_text(textwrap.dedent(LAUNCHER))
    (tmp_path / "watcher.py").write_text(textwrap.dedent(WATCHER))
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "torch.distributed.py"), str(tmp_path / "watcher.py"), how],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready, gone = tmp_path / "watcher.py.ready", tmp_path / "watcher.py.gone"
    until = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    assert not gone.exists()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    time.sleep(4)
    return ready.read_text(), gone.exists()


def test_the_death_of_a_launcher_is_noticed(tmp_path):
    assert launched(tmp_path, "launches") == ("1", True)


def test_a_launcher_that_died_before_anyone_looked_is_noticed(monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    gone: list[str] = []
    monkeypatch.setattr("diffdpo.engine.launcher.launchers", list)
    watch_launcher(gone.append)
    assert gone == ["the launcher"]


@pytest.mark.parametrize(
    ("parent", "left"),
    [(Above(1, "init"), True), (Above(70, "systemd"), True), (Above(70, "bash"), False), (None, False)],
)
def test_the_lower_launcher_of_deepspeed_whose_upper_one_has_died(monkeypatch, parent, left):
    """The rank sees the lower one live; the upper one died while the lower one imported torch."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    lower = Above(80, "python", ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], parent)
    upper = Above(
        1, "python", ["python", "/usr/bin/deepspeed", "launch/train.py"]
    )  # as the first process of a container
    assert is_left_alone(lower) == left
    assert not is_left_alone(Above(80, "python", lower.line, upper))
    assert not is_left_alone(Above(80, "python", ["python", "/usr/bin/torchrun"], parent))
    gone: list[str] = []
    monkeypatch.setattr("diffdpo.engine.launcher.launchers", lambda: [lower])
    monkeypatch.setattr("diffdpo.engine.launcher._watch", lambda watched, on_death: None)
    watch_launcher(gone.append)
    assert gone == (["the launcher"] if left else [])


def test_without_a_launcher_nothing_is_watched(tmp_path):
    assert launched(tmp_path, "does not") == ("0", False)
