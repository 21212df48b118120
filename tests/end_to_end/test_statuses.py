"""What MLflow says of a run in the ways it can end that no other test meets, and that a resumed run is the same run."""

import json
import os
import signal
import subprocess
import sys

import mlflow
import pytest

from data_pipeline.errors import DataError
from diffdpo import Callback
from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.training import preference
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def flags(tiny_model, pairs_file, uri, tmp_path) -> list[str]:
    shared = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--eval_data", str(pairs_file)]
    shared += ["--max_eval_pairs", "4", "--eval_task", "none", "--num_mc_samples", "1", "--tracking_uri", uri]
    shared += ["--max_length", "128", "--max_prompt_length", "64", "--output_dir", str(tmp_path / "run")]
    return [*shared, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_steps", "4"]


def run_of(uri: str, folder) -> mlflow.entities.Run:
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    return mlflow.MlflowClient(uri).get_run(run_id)


class Breaks(Callback):
    """Raises in the second step."""

    def __init__(self, error: BaseException):
        self.error = error

    def on_step(self, step, report):
        if step == 2:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("of the user"), "FAILED"), (ZeroDivisionError("of ours"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
    ids=["user error", "bug", "Ctrl-C"],
)
def test_errors(flags, uri, tmp_path, error, status):
    with pytest.raises(type(error)):
        preference.train(parse_config(TrainConfig, [*flags, "--save_steps", "1"], ""), callbacks=[Breaks(error)])
    found = run_of(uri, tmp_path / "run")
    assert found.info.status == status and found.info.end_time
    again = preference.train(parse_config(TrainConfig, [*flags, "--resume_from_checkpoint", "latest"], ""))
    assert again.complete and again.run_id == found.info.run_id
    assert run_of(uri, tmp_path / "run").info.status == "FINISHED"


def test_early_stopping_is_a_finished_run(flags, uri, tmp_path):
    early = ["--eval_steps", "1", "--early_stopping_patience", "1", "--metric_for_best_model", "rewards/margins"]
    early += ["--greater_is_better", "false", "--learning_rate", "2e-2", "--warmup_steps", "0", "--save_steps", "1"]
    result = preference.train(parse_config(TrainConfig, [*flags, *early], ""))
    found = run_of(uri, tmp_path / "run")
    assert result.complete and found.info.status == "FINISHED"
    assert found.data.metrics["loss"] and result.steps < 4, "it ended before its last step"


def test_a_mistake_before_the_first_step_makes_no_run(flags, uri, tmp_path):
    with pytest.raises(DataError):
        preference.train(parse_config(TrainConfig, [*flags, "--max_length", "2", "--max_prompt_length", "1"], ""))
    assert not (tmp_path / "run").exists()


def test_kill_9_is_told_later_and_the_resumed_run_is_the_same(flags, uri, tmp_path):
    """Nobody can tell of it at once; the next run beside it, or --sync, does."""
    kills = "import os, signal, sys; from tests.end_to_end.test_statuses import *\n"
    kills += "class Kills(Callback):\n    def on_step(self, step, report):\n"
    kills += "        if step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
    kills += "preference.train(parse_config(TrainConfig, sys.argv[1:], ''), callbacks=[Kills()])"
    words = [sys.executable, "-c", kills, *flags, "--save_steps", "1"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    from diffdpo.cli import compare

    assert compare.main(["--sync", str(tmp_path / "run")]) == 0
    killed = run_of(uri, tmp_path / "run")
    assert killed.info.status == "KILLED"
    again = preference.train(parse_config(TrainConfig, [*flags, "--resume_from_checkpoint", "latest"], ""))
    resumed = run_of(uri, tmp_path / "run")
    assert again.run_id == resumed.info.run_id == killed.info.run_id and resumed.info.status == "FINISHED"
    points = mlflow.MlflowClient(uri).get_metric_history(again.run_id, "loss")
    assert [point.step for point in points] == [1, 2, 3, 4]
