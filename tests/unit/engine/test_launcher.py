"""A launcher that has died is noticed; a shell is none."""

import signal
import subprocess
import sys
import textwrap
import time

from diffdpo.engine.launcher import watch_launcher
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


def test_without_a_launcher_nothing_is_watched(tmp_path):
    assert launched(tmp_path, "does not") == ("0", False)
