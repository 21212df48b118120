"""The card of a saved model: what the hub reads at its head, and nothing of this machine."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from diffdpo.config import SftConfig, TrainConfig, make_config
from diffdpo.evaluation.result import Evaluation, comparison
from diffdpo.training.card import how_it_was_made, hub_data_sets, licence_of, model_card

RESULTS = comparison(
    Evaluation({"rewards/accuracies": [0.5, 0.5], "rewards/margins": [0.0, 0.0]}),
    Evaluation({"rewards/accuracies": [1.0, 0.5], "rewards/margins": [0.3, 0.1]}),
)


def folder_of(tmp_path, **adapter):
    folder = tmp_path / "my-run" / "final"
    folder.mkdir(parents=True)
    if adapter:
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def base_of(tmp_path, licence="license: apache-2.0"):
    base = tmp_path / "models" / "tiny"
    base.mkdir(parents=True)
    (base / "README.md").write_text(f"---\n{licence}\ntags: [x]\n---\nwords\n")
    return str(base)


def test_the_head_is_what_the_hub_reads(tmp_path):
    base = base_of(tmp_path)
    config = make_config(
        TrainConfig, {"beta": 0.2, "train_data": "org/pairs,other/set@main", "model_name_or_path": base}
    )
    card = ModelCard(model_card(folder_of(tmp_path), base=base, config=config, results=RESULTS))
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("tiny", "apache-2.0", "transformers")
    assert data.datasets == ["org/pairs", "other/set"] and data.model_name == "my-run"
    assert "diffusion-dpo" in data.tags
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"rewards/accuracies": 0.75, "rewards/margins": pytest.approx(0.2)}
    assert "diffdpo generate" in card.text and "| 50.0 ± 0.0 % | 75.0 ±" in card.text


def test_what_was_chosen_and_met_is_told(tmp_path):
    resolved = make_config(TrainConfig, {"model_name_or_path": "org/m", "engine": "plain", "template": "plain"})
    facts = {"pairs": 40, "parameters": 7, "trained_parameters": 3, "dtype": "float32", "why_reference": "x"}
    made = how_it_was_made(resolved, facts)
    assert made["engine"] == "plain" and made["pairs"] == 40 and "why_reference" not in made
    card = model_card(folder_of(tmp_path), base="org/m", config=resolved, made=made, results=RESULTS)
    block = re.search(r"## How it was made\n\n```yaml\n(.*?)```", card, re.DOTALL)
    assert yaml.safe_load(block[1]) == made


def test_nothing_of_this_machine_is_in_it(tmp_path):
    base, data = base_of(tmp_path), tmp_path / "secret place" / "pairs.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    settings = {
        "model_name_or_path": base,
        "train_data": str(data),
        "output_dir": str(tmp_path / "my-run"),
        "beta": 0.3,
    }
    settings |= {
        "tracking_uri": "http://internal:5000",
        "data_cache_dir": str(tmp_path),
        "hub_token": "hf_x",
        "push_to_hub": True,
    }
    card = model_card(folder_of(tmp_path), base=base, config=make_config(TrainConfig, settings), results=RESULTS)
    assert not [word for word in (str(tmp_path), "secret place", "internal", "hf_x", "num_mc_samples") if word in card]
    assert "beta: 0.3" in card and "train_data: pairs.jsonl" in card and "model_name_or_path: tiny" in card


def test_an_adapter_is_peft_s_and_a_new_model_has_no_base(tmp_path):
    adapter = folder_of(tmp_path, base_model_name_or_path="org/base")
    data = ModelCard(model_card(adapter, base="org/base@v1", config=make_config(TrainConfig, {}))).data
    assert (data.library_name, data.base_model, data.license, data.eval_results) == ("peft", "org/base", None, None)
    (tmp_path / "new").mkdir()
    data = ModelCard(model_card(tmp_path / "new", base=None, config=make_config(SftConfig, {}))).data
    assert data.base_model is None and "diffusion-dpo" not in data.tags


@pytest.mark.parametrize("licence", ["license: [a", "license: [a, b]", "other: 1", "license:"])
def test_a_licence_that_is_not_said_is_not_guessed(tmp_path, licence):
    assert licence_of(base_of(tmp_path, licence)) == {}


def test_a_licence_of_ones_own_keeps_its_name(tmp_path):
    base = base_of(tmp_path, "license: other\nlicense_name: ours\nlicense_link: LICENSE")
    data = ModelCard(model_card(folder_of(tmp_path), base=base)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "ours", "LICENSE")


@pytest.mark.parametrize(
    ("data", "found"),
    [(None, []), ("org/set", ["org/set"]), ("https://host/a.jsonl", []), ("org/set:train", ["org/set"])],
)
def test_only_data_sets_of_the_hub_are_named(data, found):
    assert hub_data_sets(TrainConfig(train_data=data)) == found
