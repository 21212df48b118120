"""Runs by their names in MLflow, sent later where a server was away, read back as from their folders."""

import pytest

from diffdpo.cli.compare import main
from diffdpo.comparison.find import find_runs
from diffdpo.comparison.tables import compare
from diffdpo.errors import UserError
from diffdpo.tracking.mlflow_run import Shipped
from tests.support.recorded_run import recorded_run


def test_ids_names_experiments_and_filters(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
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
