"""Whatever a caller of ``import diffdpo`` gives by mistake is a UserError or DataError of one line, before any work."""

import re

import pytest
import torch

import diffdpo

PAIRS = [{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}]


class Silent(diffdpo.Callback):
    """Hears nothing."""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_steps": "abc"}, "max_steps"),
        ({"max_steps": [1]}, "max_steps"),
        ({"max_steps": None}, "max_steps"),
        ({"per_device_train_batch_size": "abc"}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": [2], "max_steps": 1}, "per_device_train_batch_size"),
        ({"output_dir": ["a", "b"]}, "output_dir"),
        ({"data_cache_dir": {1: 2}, "max_step": 3}, "max_step"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"lora_r": 8}, "lora_r"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear"),
        ({"train_data": 5}, "train_data"),
        ({"train_data": {"train": PAIRS}}, "train_data"),
        ({"callbacks": [lambda step: 1]}, "diffdpo.Callback"),
        ({"callbacks": Silent}, "the class Silent"),
        ({"callbacks": 5}, "diffdpo.Callback"),
    ],
)
@pytest.mark.parametrize("function", [diffdpo.train, diffdpo.sft])
def test_training_tells_a_mistake_in_one_line(function, settings, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((diffdpo.UserError, diffdpo.DataError)) as told:
        function(**{"train_data": PAIRS} | settings)
    assert named in str(told.value) and "\n" not in str(told.value)
    assert {path.name for path in tmp_path.glob("outputs/*")} <= {"data_cache"}, "no run was begun"


@pytest.mark.parametrize(
    ("prompts", "settings", "named"),
    [
        (5, {}, "int"),
        ([5], {}, "prompt 1"),
        (["1", []], {}, "prompt 2"),
        ([{"role": "user", "content": "1"}], {}, "list of chats"),
        ([[{"rol": "user", "content": "1"}]], {}, "role"),
        ([[{"role": "user", "content": 1}]], {}, "content"),
        ({"prompt": "1"}, {}, "dict"),
        ("1", {"batch_size": "x"}, "batch_size"),
        ("1", {"batch_size": 0}, "batch_size"),
        ("1", {"seed": "x"}, "seed"),
        ("1", {"gen_length": "abc"}, "gen_length"),
        ("1", {"gen_length": None}, "gen_length"),
        ("1", {"temperature": [1]}, "temperature"),
        ("1", {"model": torch.nn.Linear(2, 2)}, "Linear"),
        ("1", {"lenght": 3}, "lenght"),
    ],
)
def test_sampling_tells_a_mistake_in_one_line(prompts, settings, named):
    with pytest.raises(diffdpo.UserError) as told:
        diffdpo.generate(prompts, **settings)
    assert named in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("pairs", "settings", "named"),
    [
        (PAIRS, {"model": torch.nn.Linear(2, 2)}, "Linear"),
        (PAIRS, {"num_mc_samples": "many"}, "num_mc_samples"),
        (PAIRS, {"num_mc": 4}, "num_mc_samples"),
        (5, {}, "int"),
        ([5], {}, "record 1"),
    ],
)
def test_scoring_tells_a_mistake_in_one_line(pairs, settings, named):
    with pytest.raises((diffdpo.UserError, diffdpo.DataError)) as told:
        diffdpo.score(pairs, **settings)
    assert named in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: diffdpo.train("a", model_name_or_path="b"), "model_name_or_path is given twice"),
        (lambda: diffdpo.train(reference_model="a", ref_model_name_or_path="b"), "ref_model_name_or_path"),
        (lambda: diffdpo.score(PAIRS, "a", model_name_or_path="b"), "model_name_or_path is given twice"),
        (lambda: diffdpo.score(PAIRS, reference="a", ref_model_name_or_path="b"), "ref_model_name_or_path"),
        (lambda: diffdpo.evaluate(PAIRS, "a", model_name_or_path="b"), "model_name_or_path is given twice"),
        (lambda: diffdpo.score(PAIRS, output="scores.jsonl"), "output"),
        (lambda: diffdpo.score(iter(PAIRS)), "list(data.take(1000))"),
    ],
)
def test_nothing_that_is_given_is_passed_over(call, named):
    with pytest.raises((diffdpo.UserError, diffdpo.DataError), match=re.escape(named)):
        call()


def test_a_model_in_memory_is_taken_as_it_is(tiny_model):
    """Where and how it computes is its own; what is read beside it is read alike."""
    loaded = diffdpo.load(tiny_model, dtype="bfloat16")
    assert (loaded.device.type, loaded.dtype) == ("cpu", "bfloat16")
    for function, given in ((diffdpo.generate, "1 + 1 ="), (diffdpo.score, PAIRS)):
        with pytest.raises(diffdpo.UserError, match="dtype is float32 and the model in memory is in bfloat16"):
            function(given, model=loaded, dtype="float32")
    with pytest.raises(diffdpo.UserError, match="device is cuda and the model in memory is on cpu"):
        diffdpo.generate("1 + 1 =", model=loaded, device="cuda")
    with pytest.raises(diffdpo.UserError, match="device is cuda and the model in memory is on cpu"):
        diffdpo.evaluate(PAIRS, model=loaded, device="cuda")
    (line,) = diffdpo.score(PAIRS, model=loaded, reference=tiny_model, num_mc_samples=2)
    assert line["chosen"]["log_ratio"] == 0, "the reference is read in bfloat16 too"


@pytest.fixture
def adapter(tiny_model, tmp_path):
    from diffdpo.models.load import save_model
    from diffdpo.models.lora.adapters import add_lora

    torch.manual_seed(0)
    loaded = diffdpo.load(tiny_model)
    adapted = add_lora(loaded.model, loaded.spec, r=2, alpha=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_named_is_the_model_s_alone(tiny_model, adapter):
    named = {"model": tiny_model, "adapter_name_or_path": str(adapter), "num_mc_samples": 2}
    (line,) = diffdpo.score(PAIRS, reference=tiny_model, **named)
    assert abs(line["chosen"]["log_ratio"]) > 1e-3


def test_training_goes_on_with_an_adapter(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{n} + 1", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(4)]
    common = {"max_steps": 1, "per_device_train_batch_size": 2, "num_mc_samples": 2, "eval_fraction": 0}
    started = diffdpo.load(adapter)
    weights = []
    for number, model in enumerate((adapter, started)):
        run = diffdpo.train(model, pairs, output_dir=f"run{number}", tracking_uri="none", **common)
        weights.append({name: value for name, value in run.model.state_dict().items() if "lora_B.default" in name})
    before = started.model.state_dict()
    assert weights[0]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and not torch.equal(value, before[name])
        assert torch.allclose(value, before[name], atol=0.01)


def test_numbers_as_text_and_one_callback_alone_are_taken(tiny_model, tmp_path):
    heard = []

    class Hears(diffdpo.Callback):
        def on_step(self, step, report):
            heard.append(step)

    pairs = [{"prompt": f"{n} + 1", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(4)]
    result = diffdpo.train(
        str(tiny_model),
        pairs,
        callbacks=Hears(),
        max_steps="2",
        per_device_train_batch_size="2",
        num_mc_samples=2,
        eval_fraction=0,
        tracking_uri="none",
        output_dir=tmp_path / "run",
    )
    assert heard == [1, 2] and result.output_dir == tmp_path / "run"
