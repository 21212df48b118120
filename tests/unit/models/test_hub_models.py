"""Models by name: from a stand-in for the hub, from what is kept of them here, and names that nobody has."""

import socket
import threading
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch

import data_pipeline.hub
from data_pipeline.commands.common import load_tokenizer
from data_pipeline.errors import DataError
from diffdpo.errors import UserError
from diffdpo.models.load import load_model, read_config
from tests.support.hub import REVISION, hub_with

NOBODY = "http://127.0.0.1:9"  # where nobody listens


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """``connect(address)``: what a process started there would find, its cache being this test's."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def connect(address: str) -> None:
        monkeypatch.setattr(hub, "ENDPOINT", address)
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        data_pipeline.hub._only_kept_of_hub.cache_clear()

    return connect


def test_a_model_of_the_hub_is_kept_for_when_it_does_not_answer(tiny_model, connect):
    with hub_with(tiny_model, "org/model", "model") as address:
        connect(address)
        first = load_model("org/model")
        pinned = load_model(f"org/model@{REVISION}")
        with pytest.raises(
            UserError, match="no revision 'v9' of 'org/model' on the hub; give a branch, a tag or a commit"
        ):
            load_model("org/model@v9")
        with pytest.raises(UserError, match="'org/other': it is no folder here, and the hub has no such model"):
            load_model("org/other")
    connect(NOBODY)
    again = load_model("org/model")
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))
    assert all(map(torch.equal, first.model.parameters(), pinned.model.parameters()))
    assert again.model.name_or_path == pinned.model.name_or_path == "org/model", "what is saved names the repository"
    assert load_tokenizer("org/model")[0].get_vocab() == first.tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"'org/other': .* no copy of it is kept, and the hub does not answer"):
        read_config("org/other")
    with pytest.raises(DataError, match=r"'org/other': .* no copy of it is kept"):
        load_tokenizer("org/other")


def test_a_hub_that_says_nothing_is_asked_once(connect, monkeypatch):
    monkeypatch.setattr(data_pipeline.hub, "ANSWER_SECONDS", 0.1)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=lambda: asked.append(silent.accept()), daemon=True).start()
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"the hub does not answer \(.*timed out"):
            load_model("org/model")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "message"), [("", "no such folder"), ("./x", "no such folder"), (str(Path(__file__)), "it is a file")]
)
def test_what_cannot_be_a_name_is_not_asked_for(name, message, connect):
    connect(NOBODY)
    with pytest.raises(UserError, match=message):
        load_model(name)
