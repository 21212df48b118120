"""Settings: where a value comes from, and one clear line for every mistake."""

import dataclasses

import pytest

from diffdpo.cli.flags import parse_config
from diffdpo.config import SftConfig, TrainConfig, to_yaml, usual_settings
from diffdpo.errors import UserError
from diffdpo.settings.base import changed, public, without_secrets


def parse(*argv: str) -> TrainConfig:
    return parse_config(TrainConfig, argv, "")


def test_defaults_then_recipe_then_flags(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-4\nbeta: 0.5\ngradient_checkpointing: true\nmax_steps: 7\n")
    config = parse("--config", str(recipe), "--beta", "0.3", "--model_name_or_path", "x")
    assert (config.learning_rate, config.beta, config.max_steps) == (1e-4, 0.3, 7)
    assert config.gradient_checkpointing is True and config.label_smoothing == 0.0


def test_a_run_s_settings_are_a_recipe_for_it(tmp_path):
    config = parse("--beta", "0.3", "--bf16", "false", "--loss_type", "ipo")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_the_bundled_recipe_holds_unless_a_model_or_data_is_named(pairs_file):
    bundled = parse()
    assert bundled.max_length == 128 and bundled.learning_rate is not None
    assert parse("--max_length", "256").max_length == 256
    assert parse("--model_name_or_path", "x").max_length == TrainConfig.max_length
    assert parse("--train_data", str(pairs_file)).learning_rate is None


def test_asked_for_is_what_was_typed_and_not_the_bundled_recipe(pairs_file):
    def asked(*argv: str) -> dict:
        config = parse(*argv)
        return changed(config, usual_settings(config))

    assert asked() == {}
    assert asked("--beta", "0.3", "--max_length", "128") == {"beta": 0.3}  # 128 is what the bundled recipe has
    assert asked("--max_length", str(TrainConfig.max_length)) == {"max_length": TrainConfig.max_length}
    of_data = {"train_data": str(pairs_file), "num_train_epochs": 2}
    assert asked("--train_data", str(pairs_file), "--num_train_epochs", "2") == of_data


def test_flags_of_both_spellings_of_true():
    assert parse("--bf16").bf16 is True and parse("--bf16", "false").bf16 is False and parse().bf16 is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--beta", "0"], "--beta"),
        (["--max_steps", "0"], "--max_steps"),
        (["--max_length", "10", "--max_prompt_length", "10"], "--max_prompt_length"),
        (["--label_smoothing", "0.6"], "--label_smoothing"),
        (["--load_in_4bit"], "--use_peft"),
        (["--reference", "adapter_off"], "--use_peft"),
        (["--reference", "copy", "--reference_cache", "x"], "--reference_cache"),
        (["--precompute_only"], "--reference precomputed"),
        (["--use_peft", "--lora_r", "0"], "--lora_r is 0"),
        (["--use_peft", "--lora_alpha", "0"], "--lora_alpha is 0"),
        (["--use_dora"], "add --use_peft"),
        (["--lora_target_modules", "q_proj"], "add --use_peft"),
        (["--engine", "deepspeed"], "--ds_config"),
        (["--ds_config", "nowhere.json"], "no such file"),
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume_from_checkpoint", "latest"], "--output_dir"),
        (["--per_device_train_batch_size", "0"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
        (["--adam_beta1", "2"], "--adam_beta1"),
        (["--adam_epsilon", "-1"], "--adam_epsilon"),
        (["--lora_r", "0"], "--lora_r"),
        (["--num_generated_pairs", "0"], "--num_generated_pairs"),
        (["--run_name", "a/b"], "--run_name"),
        (["--eval_data", __file__], "--train_data"),
        (["--train_data", ""], "--train_data is empty"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--beta", "x"], "--beta is 'x'; it must be a number"),
        (["--lora_r", "1.5"], "--lora_r is '1.5'; it must be a whole number"),
        (["--bf16", "perhaps"], "--bf16 is 'perhaps'; it must be true or false"),
        (["--engine", "jax"], "--engine is 'jax'; allowed: auto, deepspeed, plain"),
        (["--loss_type", "sigmoid", "best"], "--loss_type 'best': unknown; choose among sigmoid"),
        (["--warmup_steps", "1.5"], "--warmup_steps is 1.5; give a whole number of steps, or a share"),
        (["--logging_steps", "0"], "--logging_steps is 0; it must be above 0"),
        (["--model_revision", "v1"], "--model_revision is of a model on the hub"),
        (["--hub_model_id", "a/b"], "add --push_to_hub"),
        (["--hub_token", "hf_x"], "--hub_token is about a push to the hub"),
        (["--lr_scheduler_type", "greedy"], "--lr_scheduler_type greedy is not offered: it follows a measured loss"),
        (["--lr_scheduler_kwargs", "{"], "give a JSON object"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "--lr_scheduler_type cosine takes num_cycles"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "needs min_lr or min_lr_rate in --lr_scheduler_kwargs"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "needs num_decay_steps"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "7"], "use constant_with_warmup"),
        (["--lr_scheduler_type", "polynomial", "--learning_rate", "1e-8"], "is not above 1e-07"),
    ],
)
def test_mistakes_are_named(argv, said):
    with pytest.raises(UserError, match=said) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--bata", "1"], ["--beta"], ["0.5"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rte: 1", "learning_rte"),
        ("- a\n- b", "holds no settings"),
        ("beta: [1]", "beta"),
        ("max_steps: 1.5", "max_steps"),
        ("engine: jax", "allowed"),
        ("a: b: c", "not a YAML file"),
        ("bf16: perhaps", "bf16"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        parse("--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', "offload_optimizer must be an object"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": null}}', "offload_optimizer must be an object"),
        ('{"optimizer": {"params": "auto"}}', "optimizer.params must be an object"),
        ('{"scheduler": {"type": "WarmupLR"}}', "--lr_scheduler_type"),
        ('{"zero_optimisation": {"stage": 2}}', "'zero_optimization' is meant"),
    ],
)
def test_a_ds_config_of_another_shape_is_named(tmp_path, content, said):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=said):
        parse("--ds_config", str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("name", "value"), [("beta", -1), ("eval_fraction", 1.0), ("lora_r", 0), ("reference", "copied"), ("seed", "x")]
)
def test_flags_and_recipes_are_refused_in_the_same_words(tmp_path, name, value):
    (tmp_path / "recipe.yaml").write_text(f"{name}: {value}\n")
    said = []
    for argv in ([f"--{name}", str(value)], ["--config", str(tmp_path / "recipe.yaml")]):
        with pytest.raises(UserError) as caught:
            parse(*argv)
        said.append(str(caught.value).removeprefix(f"--config {tmp_path / 'recipe.yaml'}: "))
    assert said[0] == said[1] and f"--{name}" in said[0]


def test_a_loss_that_is_named_is_taken_alone():
    assert parse().sft_weight == 1.0 and parse("--loss_type", "sigmoid,sft").sft_weight == 0.0
    assert parse("--loss_type", "ipo").sft_weight == 0.0
    assert parse("--loss_type", "ipo", "--sft_weight", "0.5").sft_weight == 0.5


def test_a_broken_ds_config_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        parse("--ds_config", str(tmp_path / "ds.json"))


def test_what_a_resumed_run_writes_down_is_the_run_from_its_start(tmp_path):
    config = parse("--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse("--config", str(tmp_path / "config.yaml")) == dataclasses.replace(config, resume_from_checkpoint=None)


def test_a_token_is_in_no_record():
    config = parse("--push_to_hub", "--hub_token", "hf_secret")
    assert config.hub_token == "hf_secret"
    assert "hf_secret" not in to_yaml(config) + repr(config) + str(public(config))
    shown = without_secrets(["train.py", "--hub_token", "hf_secret", "--hub-token=hf_secret"], config)
    assert shown == ["train.py", "--hub_token", "***", "--hub-token=***"]


def test_recipes_of_the_project_are_readable():
    from tests.support.paths import ROOT

    for path in (ROOT / "recipes").glob("*.yaml"):
        if path.name.startswith("on_policy"):  # of rounds: tests/docs/test_page_of_on_policy.py reads it
            continue
        kind = SftConfig if path.name.startswith("sft") else TrainConfig
        parse_config(kind, ["--config", str(path)], "")


def test_weights_of_answers_are_not_negative():
    with pytest.raises(UserError, match="at least 0"):
        parse("--desirable_weight", "-1")


@pytest.mark.parametrize("config_class", [TrainConfig, SftConfig])
def test_an_adapter_is_no_policy_to_train(config_class, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="is a LoRA adapter; go on with it as --adapter_name_or_path, or merge it first"
    ):
        parse_config(config_class, ["--model_name_or_path", str(tmp_path)], "")
