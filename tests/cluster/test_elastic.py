"""Three hosts: one that dies leaves the others to go on; accelerate starts what torchrun starts; own disks."""

import subprocess
import sys

import pytest

from tests.cluster.hosts import why_no_hosts

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(4000)]


@pytest.mark.parametrize(
    "words",
    [["elastic"], ["elastic", "--engine", "fsdp2"], ["elastic", "--engine", "zero2"], ["accelerated"], ["disks"]],
    ids=" ".join,
)
def test_the_script_finds_no_difference(tiny_model, words):
    if reason := why_no_hosts():
        pytest.skip(reason)
    model = ["--model", str(tiny_model)] if words != ["disks"] else []
    line = [sys.executable, "-m", f"tests.cluster.{words[0]}", *words[1:], *model]
    done = subprocess.run(line, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
