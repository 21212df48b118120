"""Cells as processes: resumed, told when they fail, retried by choice, and ended with the sweep.

The runs here are a script that leaves a run's files; ``tests/end_to_end`` has real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from diffdpo.cli.sweep import main
from diffdpo.errors import UserError
from diffdpo.sweep.grid import read_grid
from diffdpo.sweep.work import Work, environment_of
from tests.support.paths import ROOT

RUN = """
import os, signal, sys, time
from pathlib import Path
from tests.support.recorded_run import recorded_run
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
out, beta = Path(flags["--output_dir"]), float(flags["--beta"])
if beta > 90 and not (out.parent / "mended").exists():
    print("step 1\\nerror: --beta is too large"); sys.exit(1)
if beta > 40 and not (out.parent / "go on").exists():
    def stop(*_):
        (out.parent / "told").touch(); sys.exit(3)
    signal.signal(signal.SIGTERM, stop); (out.parent / "waits").touch(); time.sleep(60)
recorded_run(out, margins=[beta, -0.1, 0.2], beta=beta)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A folder, and what runs the sweep of its grid."""
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(Work, "_program", lambda self: [sys.executable, str(tmp_path / "run.py")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(text: str, *flags: str) -> int:
        (tmp_path / "grid.yaml").write_text(text)
        return main(
            [str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "out"), "--tracking_uri", "none", *flags]
        )

    return tmp_path / "out", run


def states(out) -> dict[str, tuple[int, int]]:
    found = {path.stem: json.loads(path.read_text()) for path in (out / ".sweep").glob("*.json")}
    return {name: (state["exit_code"], state["tries"]) for name, state in found.items()}


def test_all_cells_run_and_are_compared(sweep, capsys):
    out, run = sweep
    assert run("grid: {beta: [0.1, 0.2, 0.3]}", "--jobs", "2") == 0
    assert states(out) == {f"beta=0.{i}": (0, 1) for i in (1, 2, 3)}
    assert "Best preference accuracy" in capsys.readouterr().out
    assert (out / "comparison.html").exists() and len((out / "comparison.csv").read_text().splitlines()) == 4
    assert run("grid: {beta: [0.1, 0.2, 0.4]}") == 0, "a value more, a value less: what is there is not run again"
    assert states(out) == {f"beta=0.{i}": (0, 1) for i in (1, 2, 3, 4)}


def test_a_failed_cell_is_told_and_retried_by_choice(sweep, capsys):
    out, run = sweep
    text = "grid: {beta: [99, 0.1]}"
    assert run(text) == 1
    told = capsys.readouterr().out
    assert "error: --beta is too large" in told and "failed: beta=99" in told
    assert run(text) == 1 and states(out)["beta=99"] == (1, 1), "not by itself"
    (out / "mended").touch()
    (out / "go on").touch()
    assert run(text, "--retry_failed") == 0
    assert states(out) == {"beta=99": (0, 2), "beta=0.1": (0, 1)}


def test_a_signal_stops_the_cells_and_the_same_command_goes_on(sweep):
    out, run = sweep
    until = time.monotonic() + 60
    child = os.fork()
    if not child:
        while not (out / "waits").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    text = "grid: {beta: [50, 0.1]}"
    assert run(text) == 3
    os.waitpid(child, 0)
    assert (out / "told").exists() and states(out) == {"beta=50": (3, 1)}
    (out / "go on").touch()
    assert run(text) == 0 and states(out) == {"beta=50": (0, 2), "beta=0.1": (0, 1)}


def test_a_sweep_that_is_killed_takes_its_runs_with_it(sweep, tmp_path):
    out, run = sweep
    (tmp_path / "grid.yaml").write_text("grid: {beta: [50]}")
    script = (
        "import sys\nfrom diffdpo.cli.sweep import main\nfrom diffdpo.sweep.work import Work\n"
        f"Work._program = lambda self: [sys.executable, {str(tmp_path / 'run.py')!r}]\n"
        f"main([{str(tmp_path / 'grid.yaml')!r}, '--output_dir', {str(out)!r}, '--tracking_uri', 'none'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        until = time.monotonic() + 60
        while not (out / "waits").exists() and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    while not (out / "told").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert (out / "told").exists() and states(out) == {"beta=50": (None, 1)}
    (out / "go on").touch()
    assert run("grid: {beta: [50]}") == 0 and states(out) == {"beta=50": (0, 2)}


def test_a_cell_that_was_begun_with_other_flags_is_not_gone_on_with(sweep):
    _, run = sweep
    assert run("grid: {beta: [0.1]}") == 0
    with pytest.raises(UserError, match="other flags"):
        run("{fixed: {learning_rate: 1}, grid: {beta: [0.1]}}")


def test_runs_beside_each_other_share_the_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment_of(0, 1) == {}
    assert [environment_of(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,6", "5,7"]
    assert int(environment_of(0, 2)["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(1, 2)


@pytest.mark.parametrize(("launcher", "word"), [("torchrun --standalone", "-m"), ("/bin/deepspeed", "--module")])
def test_launchers_are_told_of_the_module_in_their_words(tmp_path, launcher, word):
    (tmp_path / "g.yaml").write_text("grid: {beta: [1]}")
    grid = read_grid(tmp_path / "g.yaml")
    work = Work(grid, tmp_path, jobs=1, launcher=launcher.split(), extra=[], say=print)
    assert work._program() == [*launcher.split(), word, "diffdpo"]


SEARCH = "optuna: {trials: %d, metric: rewards/margins, space: {beta: {low: 0.1, high: 30.0, log: true}, seed: [0, 1]}}"


def test_optuna_proposes_cells_from_the_results_of_those_before(sweep, capsys):
    """The margin grows with beta, so what is tried later is larger."""
    out, run = sweep
    assert run(SEARCH % 14) == 0
    names = [name for name, state in states(out).items() if state == (0, 1)]
    assert 10 <= len(names) <= 14 and len(names) == len(states(out)) and "Best reward margin" in capsys.readouterr().out
    optuna = pytest.importorskip("optuna")
    study = optuna.load_study(study_name="grid", storage=f"sqlite:///{out}/.sweep/optuna.db")
    tried = [trial.params["beta"] for trial in study.trials]
    assert len(tried) == 14 and all(trial.value is not None for trial in study.trials)
    assert sorted(tried[10:])[1] > sorted(tried[:10])[5], "after ten at random it looks where the best were"
    assert run(SEARCH % 14) == 0 and all(tries == 1 for _, tries in states(out).values()), "none is run again"
    assert run(SEARCH % 15) == 0 and len(states(out)) == len(names) + 1


def test_a_search_that_was_stopped_goes_on_with_the_cell_it_had_begun(sweep):
    out, run = sweep
    child = os.fork()
    if not child:
        until = time.monotonic() + 60
        while not (out / "waits").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    text = "optuna: {trials: 2, space: {beta: [50]}}"  # the second trial proposes the same cell
    assert run(text) == 3
    os.waitpid(child, 0)
    assert states(out) == {"beta=50": (3, 1)}
    (out / "go on").touch()
    assert run(text) == 0 and states(out) == {"beta=50": (0, 2)}


def test_a_failed_proposal_is_told_and_the_search_goes_on(sweep, capsys):
    out, run = sweep
    assert run("optuna: {trials: 4, space: {beta: [99, 0.1]}}") == 1
    assert set(states(out).items()) == {("beta=99", (1, 1)), ("beta=0.1", (0, 1))}
    with pytest.raises(UserError, match="--retry_failed is for a grid"):
        run("optuna: {trials: 4, space: {beta: [99, 0.1]}}", "--retry_failed")


def test_a_metric_that_no_run_has_is_told_after_the_first_cell_and_at_the_end(sweep, capsys):
    out, run = sweep
    assert run("grid: {beta: [0.1, 0.2]}", "--metric", "nonsense") == 2
    told = capsys.readouterr().out
    named = "--metric nonsense: no run has it; there are rewards/accuracies, rewards/margins"
    assert told.count(named) == 2 and told.index(named) < told.index("beta=0.2: finished")
    assert (out / "comparison.html").exists() and "Best preference accuracy" in told
    (out / "comparison.html").unlink()
    assert run("grid: {beta: [0.1, 0.2, 0.3]}", "--metric", "nonsense") == 2, "at the start, where cells have finished"
    told = capsys.readouterr().out
    assert told.count(named) == 2 and told.index(named) < told.index("beta=0.3: started")
    assert (out / "comparison.html").exists()
    assert run("grid: {beta: [0.1, 99]}", "--metric", "nonsense") == 1, "a failed cell weighs more"
    assert run("grid: {beta: [0.1, 0.2]}", "--metric", "rewards/margins") == 0
    assert "Best reward margin" in capsys.readouterr().out


MISTYPED = "optuna: {trials: %d, metric: %s, space: {beta: [0.1, 0.2, 0.3, 0.4], seed: [0, 1, 2, 3, 4]}}"


def test_a_search_by_a_metric_that_is_not_measured_ends_after_the_first_cell(sweep, capsys):
    out, run = sweep
    for _ in range(2):  # the same command says the same, and runs no further cell
        with pytest.raises(UserError, match=r"'rewards/accuracy'.* it has rewards/margins, rewards/accuracies"):
            run(MISTYPED % (3, "rewards/accuracy"))
        assert len(states(out)) == 1
    assert run(MISTYPED % (3, "rewards/margins")) == 0
    assert set(states(out).values()) == {(0, 1)}, "the finished cell counts once the metric is corrected"
    assert "Best reward margin" in capsys.readouterr().out, "the comparison goes by the search's metric"
    assert run(MISTYPED % (3, "rewards/margins"), "--metric", "rewards/accuracies") == 0
    assert "Best preference accuracy" in capsys.readouterr().out


def test_cells_beside_the_first_are_stopped_with_a_search_that_cannot_go_on(sweep):
    out, run = sweep
    text = "optuna: {trials: 6, metric: nonsense, space: {beta: [0.1, 50], seed: [0, 1, 2, 3, 4, 5]}}"
    with pytest.raises(UserError, match="nonsense"):
        run(text, "--jobs", "6")
    assert len(states(out)) > 1 and {code for code, _ in states(out).values()} <= {0, 3, -signal.SIGTERM}


def test_a_study_of_another_metric_is_told_anew_in_its_direction(sweep):
    optuna = pytest.importorskip("optuna")
    out, run = sweep
    search = "optuna: {trials: 3, metric: %s, space: {beta: [0.1, 0.2], seed: [0, 1, 2]}}"
    with pytest.raises(UserError, match="no_loss"):
        run(search % "no_loss")
    for metric, less in (("rewards/margins", False), ("loss", True), ("rewards/margins", False)):
        for folder in out.glob("beta=*"):
            summary = json.loads((folder / "summary.json").read_text())
            summary["held_out"]["loss"] = {"after": {"mean": 2.0, "stderr": 0.1, "count": 3}}
            (folder / "summary.json").write_text(json.dumps(summary))
        assert run(search % metric) == 0
        study = optuna.load_study(study_name="grid", storage=f"sqlite:///{out}/.sweep/optuna.db")
        assert study.direction.name == ("MINIMIZE" if less else "MAXIMIZE") and len(study.trials) == 3
        assert all((trial.value == 2.0) == less for trial in study.trials)
