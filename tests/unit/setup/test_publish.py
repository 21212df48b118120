"""The final model on a stand-in for the hub: it arrives whole, and the token is told to nobody."""

import huggingface_hub.constants as hub
import pytest
import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError, UserError
from diffdpo.models.load import load_model
from diffdpo.setup.publish import check_hub, push_final
from tests.support.hub import hub_to_write

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
TOKEN = "hf_secret"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_to_write(tmp_path / "repository", user="alice", token=TOKEN) as server:
        monkeypatch.setattr(hub, "ENDPOINT", server.address)
        yield server


def config(**settings) -> TrainConfig:
    return make_config(TrainConfig, {"push_to_hub": True, "hub_token": TOKEN, **settings})


@pytest.mark.parametrize(
    ("settings", "name", "asked"),
    [
        ({}, "alice/my-run", {}),
        ({"hub_model_id": "org/model", "hub_private_repo": True}, "org/model", {"visibility": "private"}),
    ],
)
def test_the_model_on_the_hub_is_the_final_one(server, tiny_model, tmp_path, settings, name, asked):
    check_hub(config(**settings), WORLD)
    address = push_final(config(**settings), WORLD, tiny_model, run_folder=tmp_path / "my-run")
    assert address == f"{server.address}/{name}" and server.name == name
    assert asked.items() <= server.made[0].items()
    for file in tiny_model.iterdir():
        assert (server.folder / file.name).read_bytes() == file.read_bytes()
    there, here = load_model(str(server.folder)), load_model(str(tiny_model))
    assert all(map(torch.equal, there.model.parameters(), here.model.parameters()))


def test_a_wrong_token_is_told_before_training_and_is_not_shown(server):
    with pytest.raises(UserError, match="--push_to_hub: the hub does not tell who you are") as caught:
        check_hub(config(hub_token="hf_wrong"), WORLD)
    assert "hf_wrong" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_push_that_fails_says_where_the_model_is(server, tiny_model, tmp_path):
    server.token = "hf_another"  # withdrawn during the run
    with pytest.raises(TrainingError, match="did not reach the hub") as caught:
        push_final(config(), WORLD, tiny_model, run_folder=tmp_path / "my-run")
    assert f"hf upload my-run {tiny_model}" in str(caught.value) and TOKEN not in str(caught.value)


def test_without_the_flag_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    check_hub(make_config(TrainConfig, {}), WORLD)
