"""iterate: what each round samples from, trains and is compared with; the same end wherever it was broken off."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import DataError
from diffdpo.cli import iterate as command
from diffdpo.cli.main import main as diffdpo
from diffdpo.config import RoundsConfig, make_config
from diffdpo.errors import UserError
from diffdpo.onpolicy import iterate as conductor
from diffdpo.onpolicy.average import write_average
from diffdpo.onpolicy.rounds import Rounds, deal

RECIPE = """
rounds: 2
prompts: {prompts}
prompts_per_round: 4
model_name_or_path: {model}
round_reference: {reference}
tracking_uri: none
make_pairs: {{num_samples: 4, gen_length: 8, batch_size: 8, verifier: "my_judge:even", max_pairs: 2}}
train:
  eval_data: {held_out}
  per_device_train_batch_size: 2
  max_steps: 2
  save_steps: 1
  learning_rate: 1.0e-2
  warmup_steps: 0
  max_length: 96
  max_prompt_length: 64
  max_eval_pairs: 4
  num_eval_problems: 0
{more}
"""


@pytest.fixture
def recipe(tiny_model, pairs_file, tmp_path, monkeypatch):
    """A recipe for the tiny model, and stages that run in this process."""
    (tmp_path / "my_judge.py").write_text("def even(answer, truth, prompt):\n    return len(answer) % 2 == 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"{i} + {i} =\n" for i in range(9)))
    stages: list[str] = []

    def run_here(name, argv, *, launcher):
        stages.append(name)
        if name == recipe_of.dies_at:
            recipe_of.dies_at = None
            raise KeyboardInterrupt
        assert not diffdpo(list(argv))

    def recipe_of(reference="last", more=""):
        given = {"prompts": tmp_path / "prompts.txt", "model": tiny_model, "held_out": pairs_file}
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(**given, reference=reference, more=more))
        return str(path)

    recipe_of.dies_at, recipe_of.stages = None, stages
    monkeypatch.setattr(conductor, "run_stage", run_here)
    return recipe_of


def final(folder):
    return load_file(folder / "round-2" / "train" / "final" / "model.safetensors")


def test_two_rounds_and_the_same_two_broken_off_in_every_stage(recipe, tmp_path):
    path = recipe("average")
    command.main([path, "--output_dir", str(tmp_path / "whole")])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [found["round"] for found in summary] == [1, 2] and all(found["pairs"]["pairs"] for found in summary)
    for stage in ("round 1, make-pairs", "round 1, train", "round 2, make-pairs", "round 2, train"):
        recipe.dies_at = stage
        with pytest.raises(KeyboardInterrupt):
            command.main([path, "--output_dir", str(tmp_path / "broken")])
    command.main([path, "--output_dir", str(tmp_path / "broken")])
    whole, broken = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    asked = [(tmp_path / "whole" / f"round-{r}" / "prompts.jsonl").read_text().splitlines() for r in (1, 2)]
    assert len(asked[0]) == len(asked[1]) == 4 and not set(asked[0]) & set(asked[1])
    config = (tmp_path / "whole" / "round-2" / "train" / "config.yaml").read_text()
    assert "round-1/average" in config and "round-1/train/final" in config
    recipe.stages.clear()
    command.main([path, "--output_dir", str(tmp_path / "whole")])
    assert recipe.stages == [], "what is done is not done again"


def test_an_adapters_round_goes_on_with_the_last_rounds(recipe, tmp_path):
    command.main([recipe(more="  use_peft: true\n  lora_r: 4"), "--output_dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "round-2" / "train" / "final" / "adapter_config.json").read_text())
    assert config["r"] == 4
    before, after = (
        load_file(tmp_path / "out" / f"round-{r}" / "train" / "final" / "adapter_model.safetensors") for r in (1, 2)
    )
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    resolved = (tmp_path / "out" / "round-2" / "train" / "config.yaml").read_text()
    assert "reference: adapter_start" in resolved and "round-1/train/final" in resolved


def rounds(train=None, make_pairs=None, **given) -> Rounds:
    return Rounds(make_config(RoundsConfig, {"output_dir": "out", **given}), make_pairs or {}, train or {})


@pytest.mark.parametrize(
    ("reference", "adapter", "expected"),
    [
        ("last", False, {}),
        ("start", False, {"ref_model_name_or_path": "base"}),
        ("average", False, {"ref_model_name_or_path": "round-2/average"}),
        ("last", True, {}),
        ("start", True, {"reference": "adapter_off"}),
    ],
)
def test_the_reference_of_a_round(reference, adapter, expected):
    made = rounds({"use_peft": True} if adapter else {}, round_reference=reference, model_name_or_path="base")
    assert made.reference(1) == {}
    found = made.reference(3)
    assert found.keys() == expected.keys()
    assert all(found[name].endswith(value) for name, value in expected.items())


@pytest.mark.parametrize("how", ["copy", "precomputed"])
def test_the_start_stays_the_reference_of_adapters_however_it_is_held(how):
    """What is copied or scored before is the model that is named, which would be the policy as its round starts."""
    made = rounds({"use_peft": True, "reference": how}, round_reference="start", model_name_or_path="base")
    assert made.train_settings(2, tracking_uri="none")["ref_model_name_or_path"] == "base"


def test_a_mended_verifier_goes_on_and_changed_prompts_do_not(recipe, tmp_path, capsys):
    path, out = recipe(), tmp_path / "out"
    recipe.dies_at = "round 2, make-pairs"
    with pytest.raises(KeyboardInterrupt):
        command.main([path, "--output_dir", str(out)])
    (tmp_path / "my_judge.py").write_text("def even(answer, truth, prompt):\n    return len(answer) % 3 == 0\n")
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("make_pairs: {", "make_pairs: {right_at: 0.6, ", 1))
    prompts = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text(prompts + "one more\n")
    with pytest.raises(UserError, match=r"prompts .* are not those that"):
        command.main([path, "--output_dir", str(out)])
    (tmp_path / "prompts.txt").write_text(prompts)
    command.main([path, "--output_dir", str(out)])
    assert "NOTE  earlier rounds were paired with" in capsys.readouterr().out
    assert "right_at: 0.6" in (out / "round-2" / "make-pairs.yaml").read_text()


@pytest.mark.parametrize(
    "given",
    [
        {"round_reference": "average", "train": {"use_peft": True}},
        {"train": {"output_dir": "x"}},
        {"train": {"ref_model_name_or_path": "x"}},
        {"train": {"reference": "adapter_off", "use_peft": True}},
        {"make_pairs": {"seed": 3}},
        {"prompts": "p.txt"},
    ],
)
def test_what_the_rounds_set_themselves_is_refused(given):
    with pytest.raises(UserError, match=r"train|make_pairs|round_reference"):
        rounds(**given)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("roundz: 3", "rounds"),
        ("train: {learning_rat: 1}", "learning_rate"),
        ("train: 3", "train"),
        ("make_pairs: {pairing: best}", "best_worst"),
        ("make_pairs: {verifier: gsm8}", "gsm8k"),
        ("make_pairs: {verifier: 'regex:('}", "regular expression"),
        ("make_pairs: {verifier: none}", "nobody has seen"),
        ("make_pairs: {pairing: margin, margin: 2}", "0 to 1"),
        ("train: {use_peft: true, sync_ref_model: true}", "ref_model_mixup_alpha"),
        ("rounds: 0", "rounds"),
        ("- a", "settings"),
        ("a: [", "YAML"),
    ],
)
def test_wrong_recipes_end_in_one_line(tmp_path, text, named):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((UserError, DataError), match=named) as raised:
        command.main([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_held_out_answers_are_judged_by_the_verifier_of_the_pairs():
    def task(made):
        return made.train_settings(1, tracking_uri="none")["eval_task"]

    assert task(rounds()) == "arithmetic" and task(rounds(make_pairs={"verifier": "gsm8k"})) == "gsm8k"
    for nobody in ("scores:x.jsonl", "none"):
        with pytest.raises(UserError, match=f"make_pairs: verifier {nobody}: a round judges answers that nobody has"):
            rounds(make_pairs={"verifier": nobody})
    assert task(rounds({"eval_task": "number"})) == "number"


def test_too_few_prompts_are_told(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    config = make_config(RoundsConfig, {"output_dir": "out", "prompts": str(tmp_path / "p.txt"), "rounds": 3})
    with pytest.raises(UserError, match="2 distinct prompts"):
        deal(config)


def test_an_average_of_weights(tmp_path):
    for name, value in (("old", 1.0), ("new", 4.0)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((2,), value), "b": torch.full((1,), -value)}, tmp_path / name / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text("{}")
    write_average(str(tmp_path / "old"), tmp_path / "new", tmp_path / "out", decay=0.25)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["a"].tolist() == [3.25, 3.25] and found["b"].tolist() == [-3.25]
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.partial").exists()
