"""An evaluation in MLflow: a run for each model, its figures by step of training, the report as a file."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffdpo.errors import UserError
from diffdpo.settings.credentials import in_a_line
from diffdpo.tracking.commit import git_state
from diffdpo.tracking.metric_names import mlflow_name
from diffdpo.tracking.mlflow_run import check_tracking_uri, client_of
from diffdpo.tracking.run import run_tags


def log_evaluation(report: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """One MLflow run for what each run of training or model came to; checkpoints of one run are points of its curves.

    UserError where the store cannot be used or does not take it: what was evaluated stands in ``--output``.
    """
    uri = settings["tracking_uri"]
    check_tracking_uri(uri)
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    try:
        client = client_of(uri)
        name = settings["experiment_name"]
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        for run in dict.fromkeys(result["run"] for result in report["results"]):
            made = client.create_run(experiment_id, run_name=settings["run_name"] or f"evaluate {run}")
            own = [result for result in report["results"] if result["run"] == run]
            now = made.info.start_time
            metrics = [Metric(key, value, now, step) for key, value, step in points(own)]
            params = [Param(key, str(value)[:500]) for key, value in report["settings"].items()]
            tags = [
                RunTag(key, value) for key, value in (run_tags(git_state()) | {"diffdpo.command": "evaluate"}).items()
            ]
            for start in range(0, len(metrics), 1000):  # the most that a server takes at a time
                client.log_batch(made.info.run_id, metrics=metrics[start : start + 1000])
            client.log_batch(made.info.run_id, params=params[:100], tags=tags)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "evaluation.json"
                path.write_text(json.dumps({**report, "results": own}, indent=1, default=str))
                client.log_artifact(made.info.run_id, str(path))
            client.set_terminated(made.info.run_id, "FINISHED")
    except (MlflowException, OSError) as error:
        raise UserError(f"--tracking_uri {uri} did not take the results: {in_a_line(error)}") from error


def points(results: list[Mapping[str, Any]]) -> Iterator[tuple[str, float, int]]:
    """(metric, value, step) of every figure; where a task is done in several ways, they are numbered."""
    ways: dict[str, list[str]] = {}
    for result in results:
        known = ways.setdefault(result["task"], [])
        if result["task_label"] not in known:
            known.append(result["task_label"])
    for result in results:
        number = ways[result["task"]].index(result["task_label"])
        task = mlflow_name(result["task"]) + (f" {number}" if len(ways[result["task"]]) > 1 else "")
        for name, figure in result["figures"].items():
            if isinstance(figure, Mapping) and isinstance(figure.get("mean"), float):
                yield f"{task}/{name}", figure["mean"], result["step"] or 0
                if figure.get("stderr") is not None:
                    yield f"{task}/{name}_stderr", figure["stderr"], result["step"] or 0
