"""System metrics on their way to MLflow: each sample once, of all hosts, and none is lost while a server is away."""

import json
import time

import mlflow
import torch.distributed as dist

from diffdpo.engine.companions import Companions, Member
from diffdpo.tracking.mlflow_run import MlflowRun, Shipped
from diffdpo.tracking.nodes import Sample, SystemMetrics

MEMBERS = tuple(Member(rank, f"host{rank // 2}", 100 + rank, "127.0.0.1", 1, rank % 2) for rank in range(6))
CPU = "cpu_utilization_percentage"


def test_the_first_process_of_each_other_host_is_heard_once(tmp_path):
    uri, store = f"sqlite:///{tmp_path}/mlflow.db", dist.HashStore()
    system = SystemMetrics(Companions(0, MEMBERS, None, store=store))
    run = MlflowRun(tmp_path, Shipped(uri, "tests", "run"), system)
    system.listen()  # nobody has said anything
    teller = Companions(4, MEMBERS, None, store=store)
    for value in (30.0, 40.0):
        teller.tell("system-4", json.dumps({"when": 100.0, "values": {CPU: value}}))
        system.listen()
        system.listen()
    run.ship_all()
    client, run_id = mlflow.MlflowClient(uri), run.shipped.run_id
    points = client.get_metric_history(run_id, f"system/2/{CPU}")
    assert [(point.step, point.value, point.timestamp) for point in points] == [(0, 30.0, 100_000), (1, 40.0, 100_000)]
    found = client.get_run(run_id).data
    assert found.tags["node.2"] == "host2" and set(found.metrics) == {f"system/2/{CPU}"}


def test_samples_wait_for_a_server_that_is_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    away, system = "http://127.0.0.1:9", SystemMetrics()
    run = MlflowRun(tmp_path, Shipped(away, "tests", "run"), system)
    run.start()
    deadline = time.monotonic() + 60
    while len(system.waiting) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    run._stop.set()
    run._thread.join(60)
    run.shipped.tracking_uri, run._client = f"sqlite:///{tmp_path}/mlflow.db", None
    assert run.close("FINISHED", timeout=60)
    client = mlflow.MlflowClient(run.shipped.tracking_uri)
    points = client.get_metric_history(run.shipped.run_id, f"system/{CPU}")
    assert len(points) >= 4 and [point.step for point in points] == list(range(len(points)))
    assert not system.waiting


def test_a_run_that_was_over_in_a_moment_has_a_sample_too():
    system = SystemMetrics()
    system.start()
    system._stop.set()
    system._thread.join(60)
    (sample,) = system.waiting
    assert isinstance(sample, Sample) and sample.node == 0 and 0 <= sample.values[CPU] <= 100
