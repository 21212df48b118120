"""What a person sees of a run in MLflow: read back with MLflow's client."""

import json
from pathlib import Path

import mlflow
import pytest

from diffdpo.errors import TrainingError, UserError
from diffdpo.evaluation.samples import SampleFile
from diffdpo.sweep.grid import Cell, Grid
from diffdpo.sweep.parent import TAG, Parent
from diffdpo.tracking.mlflow_run import Shipped, ship_later
from diffdpo.tracking.registry import register
from diffdpo.training.record import data_inputs, parameters_of
from tests.support.recorded_run import recorded_run


@pytest.fixture
def uri(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


DATA = {"name": "pairs.jsonl", "context": "training", "digest": "ab12", "source": "pairs.jsonl", "records": "40"}


def test_changed_settings_data_answers_and_results(tmp_path, uri):
    folder = recorded_run(tmp_path / "run", margins=[1.0, 3.0], beta=0.3)
    SampleFile(folder, None).add(
        "after", [{"prompt": "1 + 1?", "right_answer": "2", "sampled": "3", "is_right": False}]
    )
    (folder / "changes.diff").write_text("+ a line\n")
    Shipped(uri, "e", "run", datasets=[DATA], status="FINISHED").write(folder)
    for _ in range(2):  # sent twice, it is there once
        ship_later(folder)
    client = mlflow.MlflowClient(uri)
    run = client.get_run(Shipped.read(folder).run_id)
    assert run.data.tags["changed"] == "beta=0.3"
    note = run.data.tags["mlflow.note.content"]
    assert note.index("+2.000 ± 1.000") < note.index("| beta | 0.3 |"), "what it came to stands first"
    (one,) = run.inputs.dataset_inputs
    assert (one.dataset.name, one.dataset.digest, one.tags[0].value) == ("pairs.jsonl", "ab12", "training")
    assert json.loads(one.dataset.profile) == {"num_rows": 40}
    paths = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "asked.yaml", "held_out.json", "changes.diff", "answers.json"} <= paths
    content = json.loads(Path(client.download_artifacts(run.info.run_id, "answers.json", str(tmp_path))).read_text())
    assert content["data"] == [[0, "after", "1 + 1?", "2", "3", False]]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]


def test_cells_are_children_whenever_the_store_comes_back(tmp_path, uri):
    cells = (Cell("a", {}), Cell("b", {}))
    for cell in cells:
        Shipped(uri, "e", cell.name, status="FINISHED").write(recorded_run(tmp_path / "sweep" / cell.name))
        ship_later(tmp_path / "sweep" / cell.name)
    grid = Grid("sweep", "train", cells, "e", None)
    away = Parent(grid, tmp_path / "sweep", "http://127.0.0.1:9")
    assert away.run_id is None and away.error
    away.close(cells, "FINISHED")
    parent = Parent(grid, tmp_path / "sweep", uri)
    (tmp_path / "sweep" / "verdict.md").write_text("a is best")
    parent.close(cells, "FINISHED")
    assert not parent.error
    client = mlflow.MlflowClient(uri)
    found = client.get_run(parent.run_id)
    assert found.info.status == "FINISHED" and found.data.tags["mlflow.note.content"] == "a is best"
    children = client.search_runs([found.info.experiment_id], f"tags.`{TAG}` = '{parent.run_id}'")
    assert {child.info.run_name for child in children} == {"a", "b"}
    assert Parent(grid, tmp_path / "sweep", uri).run_id == parent.run_id, "gone on with"


def test_a_registered_model_loads_and_answers(tmp_path, uri, tiny_model):
    folder = recorded_run(tmp_path / "run", margins=[1.0])
    Shipped(uri, "e", "run", status="FINISHED").write(folder)
    with pytest.raises(UserError, match="final/"):
        register(folder, "words")
    (folder / "final").symlink_to(tiny_model)
    with pytest.raises(UserError, match="send it first"):
        register(folder, "words")
    ship_later(folder)
    assert register(folder, "words").startswith("words version 1, alias newest")
    assert register(folder, "words@best") == "words version 2, alias best"
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/words@best")
    finally:
        mlflow.set_tracking_uri(None)
    prompts = ["Tom has 9 nuts.", "Sam has 2 beads."]
    answers = model.predict(prompts, params={"gen_length": 16, "temperature": 1.0, "seed": 3})
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert model.predict(prompts, params={"gen_length": 16, "temperature": 1.0, "seed": 3}) == answers


def test_a_store_that_is_away_takes_nothing_of_the_run_away(tmp_path, tiny_model):
    folder = recorded_run(tmp_path / "run", margins=[1.0])
    (folder / "final").symlink_to(tiny_model)
    Shipped("http://127.0.0.1:9", "e", "run", run_id="0" * 32).write(folder)
    with pytest.raises(TrainingError, match="does not take the model"):
        register(folder, "words")
    assert {path.name for path in folder.iterdir()} >= {"final", "mlflow.json"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".model")]


def test_parameters_have_values_and_no_crowd():
    from diffdpo.config import TrainConfig

    config = TrainConfig(train_data="https://u:secret@host/pairs.jsonl", beta=0.2)
    environment = {"git": None, "packages": {"torch": "2"}, "command": "x", "pairs": 7, "data_fingerprint": "ab"}
    params = parameters_of(config, environment)
    assert params["beta"] == "0.2" and params["pairs"] == "7" and "packages" not in params
    assert "None" not in params.values() and "secret" not in str(params)
    (one,) = data_inputs(config, environment)
    assert one["name"] == "pairs.jsonl" and one["records"] == "7" and "secret" not in str(one)
