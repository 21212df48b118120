"""MLflow fed from the journal: every point once, whatever the server does."""

import os
import socket
import time

import mlflow
import pytest

from diffdpo.errors import TrainingError, UserError
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.lock import alone_in
from diffdpo.tracking.mlflow_run import (
    ABANDONED,
    MlflowRun,
    Shipped,
    check_tracking_uri,
    client_of,
    ship_later,
    sqlite_uri,
)


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


@pytest.mark.parametrize("links", [True, False])
def test_a_store_that_is_made_half_is_not_there(tmp_path, monkeypatch, links):
    """A run that was told to stop meanwhile once left tables that no later one could open."""
    file = tmp_path / "new" / "ml flow.db"
    file.parent.mkdir()
    left = file.with_name(f"{file.name}.0.partial")  # by kill -9, long ago
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 2 * ABANDONED,) * 2)

    def killed(client, **asked):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mlflow.MlflowClient, "search_experiments", killed)
        client_of(sqlite_uri(file))
    assert not list(file.parent.iterdir())
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError))
    number = client_of(sqlite_uri(file)).create_experiment("x")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert client_of(sqlite_uri(file)).get_experiment_by_name("x").experiment_id == number


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


@pytest.fixture
def silent_server():
    """Accepts, and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_never_answers_holds_nobody(tmp_path, silent_server, uri):
    journal, run = Journal(tmp_path), make_run(tmp_path, silent_server)
    run.start()
    journal.write(1, {"loss": 1.0})
    time.sleep(0.5)
    began = time.monotonic()
    assert run.close("FINISHED", timeout=2.0) is False
    assert time.monotonic() - began < 3.0 and run.error is not None
    shipped = Shipped.read(tmp_path)
    assert shipped.status == "FINISHED" and not shipped.delivered
    shipped.tracking_uri = uri
    shipped.write(tmp_path)
    ship_later(tmp_path)
    assert mlflow.MlflowClient(uri).get_run(Shipped.read(tmp_path).run_id).info.status == "FINISHED"


def test_the_next_run_sends_what_the_one_before_could_not(tmp_path, uri):
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    for folder in (earlier, later):
        folder.mkdir()
        Journal(folder).write(1, {"loss": 1.0})
    left = Shipped(uri, "experiment", "earlier", status="FINISHED")
    left.write(earlier)
    run = make_run(later, uri)
    run.start()
    until = time.monotonic() + 60
    while not Shipped.read(earlier).delivered and time.monotonic() < until:
        time.sleep(0.1)
    assert run.close("FINISHED", timeout=60)
    shipped = Shipped.read(earlier)
    assert shipped.delivered and history(uri, shipped.run_id) == [(1, 1.0)]
    assert mlflow.MlflowClient(uri).get_run(shipped.run_id).info.status == "FINISHED"


def test_a_run_beside_it_that_lives_is_left_alone(tmp_path, uri):
    """As in a sweep of several at a time: two who send one journal would write one state."""
    living, later = tmp_path / "living", tmp_path / "later"
    with alone_in(living):
        Journal(living).write(1, {"loss": 1.0})
        Shipped(uri, "experiment", "living").write(living)
        later.mkdir()
        Journal(later).write(1, {"loss": 1.0})
        run = make_run(later, uri)
        run._ship_others()
        assert Shipped.read(living).run_id is None
    run._others_due = True
    run._ship_others()
    assert Shipped.read(living).run_id is not None and Shipped.read(living).status == "KILLED"


def test_a_run_that_was_killed_is_told_as_killed(tmp_path, uri):
    Journal(tmp_path).write(1, {"loss": 1.0})
    Shipped(uri, "experiment", "name").write(tmp_path)
    ship_later(tmp_path)
    assert mlflow.MlflowClient(uri).get_run(Shipped.read(tmp_path).run_id).info.status == "KILLED"


def test_damaged_lines_and_words_do_not_hold_the_rest(tmp_path, uri):
    journal = Journal(tmp_path)
    journal.write(1, {"loss": 1.0})
    journal.note(1, "--beta was 0.1 and is 0.2")
    journal.note(1, "--seed was 0 and is 1")
    with journal.path.open("ab") as file:
        file.write(bytes(20) + b"\n")
    journal.write(2, {"loss": 2.0})
    Shipped(uri, "experiment", "name").write(tmp_path)
    ship_later(tmp_path)
    run_id = Shipped.read(tmp_path).run_id
    assert history(uri, run_id) == [(1, 1.0), (2, 2.0)]
    told = "--beta was 0.1 and is 0.2; --seed was 0 and is 1"
    assert mlflow.MlflowClient(uri).get_run(run_id).data.tags["note.step-1"] == told


@pytest.mark.parametrize("content", ["", "{", '{"tracking_uri": 1, "x": 2}'])
def test_a_damaged_state_is_one_line(tmp_path, content):
    (tmp_path / "mlflow.json").write_text(content)
    with pytest.raises(UserError, match="damaged or empty") as caught:
        ship_later(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["file:///x", "./mlruns", "ftp://x"])
def test_a_store_mlflow_cannot_use_is_refused(uri):
    with pytest.raises(UserError, match="tracking_uri"):
        check_tracking_uri(uri)
