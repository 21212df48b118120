"""Folders whose names hold what a URI or a shell reads otherwise: one database, and a command that can be pasted."""

import shlex

import pytest

from diffdpo.tracking.mlflow_run import sqlite_uri
from diffdpo.tracking.run import open_command, tracking_uri

ODD = ["plain", "what? now", "50% #1", "a b", "it's $HOME", "ümlaut"]


@pytest.mark.parametrize("name", ODD)
def test_the_database_lies_where_it_is_said_to(tmp_path, name):
    from mlflow import MlflowClient

    folder = tmp_path / name / "runs"
    (folder / "one").mkdir(parents=True)
    uri = tracking_uri(None, folder / "one")
    MlflowClient(uri).create_experiment("tried")
    assert [path.relative_to(folder) for path in tmp_path.rglob("*.db")] == [(folder / "mlflow.db").relative_to(folder)]
    assert shlex.split(open_command(uri)) == ["mlflow", "ui", "--backend-store-uri", uri]


def test_a_plain_name_is_written_as_it_is(tmp_path):
    assert sqlite_uri(tmp_path / "a b" / "mlflow.db") == f"sqlite:///{tmp_path}/a b/mlflow.db"
