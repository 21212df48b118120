"""MLflow fed from the journal: every point once, whatever the server does."""

import mlflow
import pytest

from diffdpo.errors import TrainingError, UserError
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import MlflowRun, Shipped, check_tracking_uri, ship_later


@pytest.fixture
def uri(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def history(uri: str, run_id: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run_id, "loss")]


def make_run(folder, uri) -> MlflowRun:
    return MlflowRun(folder, Shipped(uri, "experiment", "name", {"beta": "0.1"}, {"a": "b"}))


def test_points_parameters_files_and_status_arrive(tmp_path, uri):
    journal = Journal(tmp_path)
    run = make_run(tmp_path, uri)
    run.start()
    for step in range(1, 41):
        journal.write(step, {"loss": float(step), "not finite": float("inf")})
    (tmp_path / "summary.json").write_text("{}")
    assert run.close("FINISHED", timeout=60)
    client = mlflow.MlflowClient(uri)
    found = client.get_run(run.shipped.run_id)
    assert found.info.status == "FINISHED" and found.data.params["beta"] == "0.1" and found.data.tags["a"] == "b"
    assert history(uri, run.shipped.run_id) == [(step, float(step)) for step in range(1, 41)]
    assert {file.path for file in client.list_artifacts(run.shipped.run_id)} == {"summary.json", "metrics.jsonl"}
    assert found.info.artifact_uri.startswith(tmp_path.as_uri()), "artifacts stand at an absolute place"


def test_shipping_twice_or_after_a_resume_repeats_no_point(tmp_path, uri):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write(step, {"loss": float(step)})
    journal.close()
    run = make_run(tmp_path, uri)
    run.ship()
    journal = Journal(tmp_path, resume_step=2)  # steps 3 and 4 are run (again)
    for step in (3, 4):
        journal.write(step, {"loss": float(step)})
    ship_later(tmp_path)
    assert history(uri, run.shipped.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_dead_server_stops_nothing_and_loses_nothing(tmp_path, uri):
    journal = Journal(tmp_path)
    run = make_run(tmp_path, "http://127.0.0.1:9")  # nobody listens there
    run.start()
    journal.write(1, {"loss": 1.0})
    assert run.close("FINISHED", timeout=0.5) is False and run.error is not None
    with pytest.raises(TrainingError, match=r"^http://127.0.0.1:9 does not take the run"):
        ship_later(tmp_path)
    shipped = Shipped.read(tmp_path)
    shipped.tracking_uri = uri  # the server is back
    shipped.write(tmp_path)
    assert ship_later(tmp_path) == 1
    run_id = Shipped.read(tmp_path).run_id
    found = mlflow.MlflowClient(uri).get_run(run_id)
    assert history(uri, run_id) == [(1, 1.0)] and found.data.params["beta"] == "0.1"
    assert found.info.status == "FINISHED" and found.data.tags["a"] == "b"


@pytest.mark.parametrize("uri", ["file:///x", "./mlruns", "ftp://x"])
def test_a_store_mlflow_cannot_use_is_refused(uri):
    with pytest.raises(UserError, match="tracking_uri"):
        check_tracking_uri(uri)
