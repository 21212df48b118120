"""Two processes that play two hosts: MLflow has the system metrics of both, and only rank 0 talks to it."""

import json
import os
import subprocess
import sys

import mlflow
import pytest

from tests.support.paths import ROOT
from tests.support.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def test_each_host_s_metrics_are_in_the_run(tiny_model, pairs_file, tmp_path):
    uri, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(out)]
    flags += ["--tracking_uri", uri, "--max_steps", "40", "--per_device_train_batch_size", "4", "--max_length", "128"]
    flags += ["--eval_fraction", "0", "--num_eval_problems", "0", "--max_prompt_length", "64"]
    both = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both |= {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    processes = [
        subprocess.Popen(
            [sys.executable, "launch/train.py", *flags],
            cwd=ROOT,
            env={**os.environ, **both, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "system metrics" not in said[1], "it told until the end"
    client = mlflow.MlflowClient(uri)
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    run = client.get_run(run_id)
    names = {name.removeprefix("system/1/") for name in run.data.metrics if name.startswith("system/1/")}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "network_receive_megabytes"} <= names
    assert {f"system/{name}" for name in names} <= set(run.data.metrics), "and those of the first host"
    assert run.data.tags["node.1"]
    steps = [point.step for point in client.get_metric_history(run_id, "system/1/cpu_utilization_percentage")]
    assert steps == list(range(len(steps)))
