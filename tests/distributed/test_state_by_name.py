"""Each engine goes on from what each other saved, on as many processes, fewer and more: same losses, same weights."""

import json
import sys
from pathlib import Path

import pytest

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
NEAR = {"rel": 1e-6, "abs": 1e-6}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]


@pytest.fixture
def work(command, tiny_model, tmp_path):
    def run(what: str, processes: int, *kinds: str) -> dict:
        out, folder = tmp_path / f"{what}-{processes}.json", tmp_path / "saved"
        folder.mkdir(exist_ok=True)
        line = [TORCHRUN, "--standalone", "--nproc_per_node", str(processes), "tests/distributed/resume_worker.py"]
        words = [what, str(tiny_model), str(folder), str(out), *kinds]
        done = command([*line, *words], timeout=1200, PYTHONPATH=str(Path.cwd()))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(out.read_text())

    return run


def check(went_on: dict, whole: dict) -> None:
    for name, (losses, apart) in went_on.items():
        assert losses == pytest.approx(whole[name.partition(" to ")[0]], **NEAR), name
        assert apart < 2e-6, name


def test_zero_2_goes_on_as_zero_3_on_one_process(work):
    whole = work("save", 2, "zero2", "fsdp2")
    went_on = work("load", 1, "zero3")
    assert set(went_on) == {"zero2 to zero3", "fsdp2 to zero3"}
    check(went_on, whole)


@pytest.mark.slow
def test_everything_goes_on_as_everything(work):
    whole = work("save", 2)
    for processes in (1, 2, 3):
        went_on = work("load", processes)
        assert len(went_on) == len(whole) ** 2
        check(went_on, whole)
