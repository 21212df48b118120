"""``--max_restarts``: what ends by a fault begins again, what ends well or was told to stop does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffdpo.config import TrainConfig
from diffdpo.errors import HUNG, RESUMABLE, UserError
from diffdpo.settings.base import check_settings
from diffdpo.training import preference
from tests.support.paths import ROOT

COMMAND = """
import os, sys, time
from pathlib import Path
from diffdpo.cli.restarts import with_restarts
from diffdpo.config import TrainConfig

folder = Path(sys.argv[1])

def work():
    start = int(os.environ["DIFFDPO_ATTEMPT"])
    with (folder / "starts").open("a") as file:
        print(start, *sys.argv[2:], file=file)
    how = (folder / "ends").read_text().split()[start]
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "sleeps":
        time.sleep(60)
    return int(how)

sys.exit(with_restarts(TrainConfig(max_restarts=2, output_dir="x"), work))
"""


def begin(folder, ends: str) -> subprocess.Popen:
    (folder / "ends").write_text(ends)
    (folder / "command.py").write_text(textwrap.dedent(COMMAND))
    return subprocess.Popen(
        [sys.executable, str(folder / "command.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("3", RESUMABLE, 1),
        ("130", 130, 1),
        ("1 0", 0, 2),
        (f"killed {HUNG} 0", 0, 3),
        ("1 1 1", 1, 3),
        ("killed killed killed", 137, 3),
    ],
)
def test_faults_are_met_by_another_start(tmp_path, ends, code, starts):
    process = begin(tmp_path, ends)
    said = process.communicate(timeout=60)[1]
    lines = (tmp_path / "starts").read_text().splitlines()
    assert process.returncode == code and len(lines) == starts
    assert lines[0] == "0" and all(line.endswith("--resume_from_checkpoint auto") for line in lines[1:])
    assert said.count("started again") == starts - 1


def test_sigterm_is_handed_on_and_nothing_is_started_again(tmp_path):
    process = begin(tmp_path, "sleeps 0")
    until = time.monotonic() + 60
    while not (tmp_path / "starts").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == RESUMABLE and len((tmp_path / "starts").read_text().splitlines()) == 1


def test_it_needs_a_folder_and_a_command():
    with pytest.raises(UserError, match="--output_dir"):
        check_settings(TrainConfig(max_restarts=1))
    with pytest.raises(UserError, match="from Python"):
        preference.train(TrainConfig(max_restarts=1, output_dir="x", learning_rate=1.0))
