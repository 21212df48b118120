"""The commands of docs/quickstart.md and docs/tracking.md, in their order, with runs of two steps."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from tests.support.paths import ROOT

SHORT = {
    "max_steps": 2,
    "num_generated_pairs": 32,
    "max_eval_pairs": 8,
    "num_eval_problems": 2,
    "per_device_train_batch_size": 2,
}


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line]


def words_of(line: str) -> list[str]:
    """A line of a page as it can be run here: this interpreter and this checkout, and training runs made short."""
    words = shlex.split(line)
    program = {"diffdpo": [sys.executable, "-m", "diffdpo"], "python": [sys.executable]}
    if words[:2] == ["diffdpo", "train"]:
        at = words.index("--max_steps")
        words = [
            *words[:at],
            *words[at + 2 :],
            *(word for key, value in SHORT.items() for word in (f"--{key}", str(value))),
        ]
    return [*program[words[0]], *words[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command):
    """Where the two runs of the quickstart are."""
    place = tmp_path_factory.mktemp("pages")
    runs = [line for line in lines("quickstart") if line.startswith("diffdpo train")]
    assert len(runs) == 2
    for line in runs:
        run(command, place, line)
    return place


def run(command, place: Path, line: str) -> str:
    done = command(words_of(line), cwd=place, timeout=400, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_every_line_is_known():
    """A line that is added to a page is run by one of these tests."""
    known = (
        "diffdpo train",
        "diffdpo compare",
        "diffdpo sweep",
        "mlflow ui",
        "python -m diffdpo.tracking",
        "python3 -m venv",
    )
    for page in ("quickstart", "tracking"):
        assert lines(page) and [line for line in lines(page) if not line.startswith(known)] == []
    readme = (ROOT / "README.md").read_text()
    for line in lines("quickstart"):
        if line.startswith("python3 -m venv"):
            assert line in readme, "the installation is the README's, which the release check runs"


def test_the_comparisons(folder, command):
    for page in ("quickstart", "tracking"):
        for line in lines(page):
            if line.startswith("diffdpo compare"):
                out = run(command, folder, line)
                assert ("Best preference accuracy" in out) == ("--sync" not in line), line
    text = (folder / "outputs/compare.html").read_text()
    assert "first" in text and "second" in text and (folder / "outputs/compare.csv").exists()


def test_the_model_registered_loads_and_answers(folder, command):
    (line,) = [line for line in lines("tracking") if "--register_model" in line]
    run(command, folder, line)
    (code,) = blocks("tracking", "python")
    (folder / "load.py").write_text(code)
    done = command([sys.executable, "load.py"], cwd=folder, timeout=400, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.strip().splitlines()[-1]
    assert answers.startswith("['") and len(answers) > 4


@pytest.mark.slow
def test_mlflow_s_page_opens(folder, free_port):
    (line,) = {line for page in ("quickstart", "tracking") for line in lines(page) if line.startswith("mlflow ui")}
    program = [str(Path(sys.executable).with_name("mlflow")), *shlex.split(line)[1:], "--port", str(free_port)]
    process = subprocess.Popen(program, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            try:
                assert "MLflow" in urlopen(f"http://127.0.0.1:{free_port}/", timeout=20).read().decode()
                return
            except (URLError, OSError):
                time.sleep(0.5)
        pytest.fail("no page")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["quickstart", "tracking"])
def test_the_sweep(page, tmp_path, command):
    text = blocks(page, "yaml")[0]
    grid = yaml.safe_load(text)
    grid["fixed"] |= SHORT
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    (line,) = [line for line in lines(page) if line.startswith("diffdpo sweep")]
    out = run(command, tmp_path, line)
    count = 6 if page == "quickstart" else 12
    assert f"{count} runs, {count} finished" in out.splitlines()[-1]


def test_the_grids_are_sweeps(tmp_path, command):
    """A fast sample of the above: their cells are read and checked."""
    for page, count in (("quickstart", 6), ("tracking", 12)):
        text = blocks(page, "yaml")[0]
        (tmp_path / "grid.yaml").write_text(text)
        assert len(run(command, tmp_path, "diffdpo sweep grid.yaml --print_flags").splitlines()) == count


def test_the_search_is_one(tmp_path):
    """Its corners are checked as a sweep checks them; cells that Optuna proposes are run in tests/unit/sweep."""
    from diffdpo.cli.sweep import _check
    from diffdpo.sweep.grid import read_grid

    (tmp_path / "search.yaml").write_text(blocks("tracking", "yaml")[1])
    grid = read_grid(tmp_path / "search.yaml")
    _check(tmp_path / "search.yaml", grid)
    assert grid.search.trials == 20 and len(grid.search.corners()) == 2
