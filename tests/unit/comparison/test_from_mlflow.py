"""Runs by their names in MLflow, sent later where a server was away, read back as from their folders."""

import shutil

import mlflow
import pytest

from diffdpo.cli.compare import main
from diffdpo.comparison.find import find_runs
from diffdpo.comparison.tables import compare
from diffdpo.errors import UserError
from diffdpo.tracking.mlflow_run import MlflowRun, Shipped, ship_later
from tests.support.recorded_run import recorded_run


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's tables, which take it seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_store, tmp_path):
    """A store of its own."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_ids_names_experiments_and_filters(uri, tmp_path, capsys):
    for name, rate in (("one", 1), ("two", 2)):
        folder = recorded_run(tmp_path / "runs" / name, margins=[1.0, 2.0], learning_rate=rate)
        Shipped(uri, "tries", name, {"learning_rate": str(rate)}, status="FINISHED").write(folder)
    assert main(["--sync", str(tmp_path / "runs")]) == 0 and capsys.readouterr().out.count("in MLflow now") == 2
    both = find_runs(["tries"], uri=uri)
    by_id = find_runs([both[0].run_id, both[0].run_id, "two"], uri=uri)
    assert [run.name for run in both] == [run.name for run in by_id] == ["one", "two"]
    filtered = find_runs([], uri=uri, experiment="tries", where="params.learning_rate = '2'")
    assert [run.name for run in filtered] == ["two"]
    beside = find_runs([str(tmp_path / "runs/one"), "two"], uri=uri)
    found = compare(beside)
    assert found.settings == ("learning_rate",) and found.differences["rewards/margins"][0].change.mean == 0.0
    local, remote = find_runs([str(tmp_path / "runs/two")])[0], beside[1]
    assert remote.after == local.after and remote.curves == local.curves and remote.rate == local.rate
    with pytest.raises(UserError, match="neither a folder"):
        find_runs(["three"], uri=uri)
    with pytest.raises(UserError, match="tries"):
        find_runs([], uri=uri, experiment="three")


def test_what_cannot_be_sent_is_told_and_the_command_fails(tmp_path, capsys):
    folder = recorded_run(tmp_path / "runs" / "one", margins=[1.0])
    Shipped("http://127.0.0.1:9", "tries", "one", status="FINISHED").write(folder)
    assert main(["--sync", str(tmp_path / "runs")]) == 1
    assert "NOT sent" in capsys.readouterr().out


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(UserError, match="no file"):
        find_runs(["x"], uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="none"):
        find_runs(["x"], uri="none")


def test_names_with_blanks_and_quotes(uri, tmp_path):
    names = ["run one", "it's two", 'say "three"']
    for number, name in enumerate(names):
        folder = recorded_run(tmp_path / "runs" / str(number), margins=[1.0], run_name=name)
        Shipped(uri, "my tries", name, status="FINISHED").write(folder)
        ship_later(folder)
    assert [run.name for run in find_runs(names, uri=uri)] == names
    with pytest.raises(UserError, match="neither a folder"):
        find_runs(['it\'s "four"'], uri=uri)


def test_what_is_no_run_of_training_is_left_out_and_a_sweep_stands_for_its_runs(uri, tmp_path, monkeypatch):
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("tries", artifact_location=str(tmp_path / "files"))
    parent = client.create_run(experiment, run_name="grid", tags={"diffdpo.sweep": "2 runs"})
    client.create_run(experiment, run_name="evaluate one", tags={"diffdpo.command": "evaluate"})
    stranger = client.create_run(experiment, run_name="of another program")
    client.log_param(stranger.info.run_id, "beta", "7")
    for beta in (0.1, 0.3):
        folder = recorded_run(tmp_path / "runs" / str(beta), margins=[1.0], beta=beta)
        tags = {"mlflow.parentRunId": parent.info.run_id} if beta == 0.1 else {}
        Shipped(uri, "tries", f"beta={beta}", tags=tags, status="FINISHED").write(folder)
        ship_later(folder)
    found = find_runs(["tries"], uri=uri)
    assert [run.name for run in found] == ["of another program", "beta=0.1", "beta=0.3"]
    assert compare(found).settings == ("beta",), "settings differ, whatever a stranger's run has"
    for name in ("grid", parent.info.run_id):
        assert [run.name for run in find_runs([name], uri=uri)] == ["beta=0.1"]
    monkeypatch.setattr("diffdpo.comparison.from_mlflow.MOST", 2)
    with pytest.raises(UserError, match=r"more than 2 runs .* narrow it down"):
        find_runs(["tries"], uri=uri)


def test_a_run_in_progress_has_a_time(uri, tmp_path):
    run = MlflowRun(recorded_run(tmp_path / "runs" / "one", finished=False, steps=4), Shipped(uri, "tries", "one"))
    run.ship()
    (found,) = find_runs(["one"], uri=uri)
    assert found.status == "running" and found.seconds == 6.0 and found.steps == 4


def test_a_damaged_file_in_mlflow_is_told(uri, tmp_path):
    folder = recorded_run(tmp_path / "runs" / "one", margins=[1.0, 2.0])
    for name, text in (("summary.json", "[]"), ("held_out.json", "{")):
        (folder / name).write_text(text)
    Shipped(uri, "tries", "one", status="FINISHED").write(folder)
    ship_later(folder)
    (found,) = find_runs(["one"], uri=uri)
    assert found.status == "finished" and found.after["rewards/margins"].mean == 1.5
    assert sorted(gap.split()[0] for gap in found.gaps) == ["held_out.json", "summary.json"]


def test_an_evaluation_is_refused_by_its_id_and_by_its_name(uri, tmp_path):
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("looks", artifact_location=str(tmp_path / "files"))
    evaluation = client.create_run(experiment, run_name="look at one", tags={"diffdpo.command": "evaluate"})
    empty = client.create_run(experiment, run_name="grid", tags={"diffdpo.sweep": "2 runs"})
    for name in (evaluation.info.run_id, "look at one"):
        with pytest.raises(UserError, match=r"is a run of `diffdpo evaluate`, and compare sets runs of training"):
            main([name, "--tracking_uri", uri])
    with pytest.raises(UserError, match="is a run of `diffdpo evaluate`"):
        main(["--experiment_name", "looks", "--tracking_uri", uri])
    with pytest.raises(UserError, match="is a sweep of which no run"):
        main([empty.info.run_id, "--tracking_uri", uri])


@pytest.mark.parametrize("arguments", [["some name"], ["--experiment_name", "x"], ["--filter", "params.beta = '1'"]])
def test_a_server_that_is_away_is_one_short_line_with_a_remedy(arguments):
    with pytest.raises(UserError) as caught:
        main([*arguments, "--tracking_uri", "http://127.0.0.1:9"])
    told = "http://127.0.0.1:9 does not answer; start that server, or name another store with --tracking_uri"
    assert str(caught.value) == told


def test_a_store_that_answers_something_else_says_what(uri):
    with pytest.raises(UserError, match=r"does not give what was asked for \(.*quoted string") as caught:
        main(["--filter", "params.beta ~ 3", "--tracking_uri", uri])
    assert "\n" not in str(caught.value) and "--filter" in str(caught.value)
