"""Flags as people write them: help, spelling, lists, shares, and the names of TRL and transformers."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffdpo.cli import trl
from diffdpo.cli.flags import groups, help_text, parse_config, read_recipe
from diffdpo.config import RunConfig, ScoreConfig, SftConfig, TrainConfig
from diffdpo.errors import UserError
from tests.support.paths import ROOT

TRL_NAMES = json.loads(Path(__file__).with_name("trl_1.16.0.json").read_text())
OLDER_NAMES = json.loads(Path(__file__).with_name("older_names.json").read_text())
"""By version: what the same classes had and have no more."""


def parse(*argv: str, config_class=TrainConfig):
    return parse_config(config_class, ["--model_name_or_path", "x", *argv], "")


def refusal(capsys, *argv: str, config_class=TrainConfig) -> str:
    """What is said in the one line, whether the parser or a check says it."""
    with pytest.raises((UserError, SystemExit)) as caught:
        parse(*argv, config_class=config_class)
    said = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


# ------------------------------------------------------------------------------------------------------- help


def test_help_is_short_grouped_and_a_line_a_flag():
    lines = help_text(TrainConfig, "What it does.", prog="diffdpo train", everything=False).splitlines()
    shown = [line for line in lines if line.startswith("  --")]
    common = [item.name for item in dataclasses.fields(TrainConfig) if item.metadata["common"]]
    assert sorted(re.match(r"  --(\w+)", line)[1] for line in shown) == sorted([*common, "config"])
    assert 18 <= len(shown) <= 26 and max(map(len, shown)) <= 130
    assert {"model:", "data:", "loss:", "reference:", "run and output:"} <= set(lines)
    assert "--help_all shows all flags" in lines[-1]


@pytest.mark.parametrize("config_class", [TrainConfig, SftConfig, ScoreConfig])
def test_help_all_has_every_flag_once_under_a_title_with_what_it_allows(config_class):
    text = help_text(config_class, "", prog="x", everything=True)
    for item in dataclasses.fields(config_class):
        assert len(re.findall(rf"^  --{item.name} ", text, re.M)) == 1
    flat = " ".join(text.split())
    for item in dataclasses.fields(config_class):
        if allowed := item.metadata["choices"] or item.metadata["known"]:
            assert f"one of: {', '.join(allowed)}" in flat
    assert all(title for title, _ in groups(config_class))


@pytest.mark.parametrize("config_class", [TrainConfig, SftConfig, ScoreConfig])
def test_each_default_is_told_once(config_class):
    assert "(default: None)" not in help_text(config_class, "", prog="x", everything=True)
    for item in dataclasses.fields(config_class):
        by_hand = "default:" in item.metadata["help"] or "required" in item.metadata["help"]
        assert by_hand == (item.default is None), item.name


def test_the_epilog_s_defaults_are_those_of_a_bare_run():
    text = " ".join(help_text(TrainConfig, "", prog="x", everything=False).split())
    config = parse_config(TrainConfig, [], "")
    told = text.split("these are the defaults: ")[1].split(". The sft_weight")[0]
    for name, value in (pair.split() for pair in told.split(", ")):
        assert float(value) == getattr(config, name)


def test_help_imports_no_torch():
    code = (
        "import sys; from diffdpo.cli.train import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'peft', 'mlflow'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model_name_or_path" in done.stdout


def test_names_that_settings_list_are_those_there_are():
    from diffdpo.noise import estimators
    from diffdpo.settings.noise import ESTIMATORS

    assert tuple(estimators.ESTIMATORS) == ESTIMATORS


# --------------------------------------------------------------------------------------------------- spelling


def test_dashes_and_equals_signs():
    config = parse("--learning-rate", "1e-5", "--max-steps=7", "--use-peft", "--loss-type=ipo")
    assert (config.learning_rate, config.max_steps, config.use_peft, config.loss_type) == (1e-5, 7, True, "ipo")


def test_dashes_in_a_value_stay():
    assert parse("--output_dir", "my-run", "--run-name=a-b").run_name == "a-b"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lerning_rate", "1"], "--learning_rate"),
        (["--num-mc-sample", "1"], "--num_mc_samples"),
        (["--precompute_ref_logprobs"], "--precompute_ref_log_probs"),
        (["--xyzzy", "1"], "there is no --xyzzy"),
        (["--use_peft", "true", "false"], "'false' belongs to no flag"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_name(argv, said, capsys):
    assert said in refusal(capsys, *argv)


def test_an_unknown_key_of_a_recipe_too(tmp_path):
    (tmp_path / "r.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(UserError, match="is --learning_rate meant") as caught:
        read_recipe(TrainConfig, tmp_path / "r.yaml")
    assert str(caught.value).startswith(f"--config {tmp_path / 'r.yaml'}: ")


def test_a_flag_of_another_command_is_told_as_such(capsys):
    assert "--beta is a flag of `train`" in refusal(capsys, "--beta", "1", config_class=SftConfig)
    assert "is a flag of `sft`" in refusal(capsys, "--config", str(ROOT / "recipes" / "sft_arithmetic.yaml"))
    assert "--reference is a flag of `train`" in refusal(capsys, "--reference_free", config_class=SftConfig)


# ----------------------------------------------------------------------------------------------- lists and shares


def test_lists_by_blanks_commas_and_in_recipes(tmp_path):
    for argv in (["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.05"], ["--loss_type", "sigmoid,sft"]):
        assert parse(*argv).loss().names == ("sigmoid", "sft")
    assert parse("--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.05").loss().weights == (1.0, 0.05)
    assert parse("--use_peft", "--lora_target_modules", "q_proj", "v_proj").lora_target_modules == "q_proj,v_proj"
    (tmp_path / "r.yaml").write_text("loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.05]\ntrain_data: [a, b]\n")
    config = parse("--config", str(tmp_path / "r.yaml"), "--data_weights", "3", "1")
    assert config.loss().weights == (1.0, 0.05) and config.train_data == "a,b"
    assert config.weights_of_sources() == [3, 1]


def test_a_source_with_a_comma_stands_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b.jsonl").write_text("")
    assert parse("--train_data", "a,b.jsonl").train_data == "a,b.jsonl"
    with pytest.raises(UserError, match="has a comma"):
        parse("--train_data", "a,b.jsonl", "c")


def test_shares_of_all_steps():
    config = parse("--warmup_steps", "0.1", "--logging_steps", "0.25", "--eval_steps", "50", "--save_steps", "1e2")
    assert (config.warmup_steps, config.logging_steps, config.eval_steps, config.save_steps) == (0.1, 0.25, 50, 100)
    assert isinstance(config.save_steps, int)


def test_a_switch_may_be_negated():
    assert parse("--no_bf16", "--no-gradient-checkpointing").bf16 is False
    assert parse("--no_remove_unused_columns", "--no_dataloader_drop_last").tail == "pad"


@pytest.mark.parametrize("flag", ["--no_disable_dropout", "--no_max_length", "--no_nothing"])
def test_a_negation_that_cannot_be_is_refused(flag, capsys):
    refusal(capsys, flag)


# -------------------------------------------------------------------------------------- names of TRL, transformers


def fields_of_training_arguments() -> set[str]:
    """Of the installed transformers, read from its source: to import it takes half a minute."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse((Path(folder) / "training_args.py").read_text())
    (body,) = [node.body for node in tree.body if getattr(node, "name", "") == "TrainingArguments"]
    names = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    return {name for name in names if not name.startswith("_")}


def test_every_name_of_trl_and_transformers_has_an_answer():
    theirs = fields_of_training_arguments()
    assert {"learning_rate", "neftune_noise_alpha", "push_to_hub"} <= theirs
    for names in (*TRL_NAMES["names"].values(), *OLDER_NAMES.values()):
        theirs |= set(names)
    assert not theirs - set(trl.SAME) - set(trl.TABLE)


def test_the_tables_do_not_hide_our_own_names():
    ours = {item.name for config_class in (TrainConfig, SftConfig) for item in dataclasses.fields(config_class)}
    assert not ours & set(trl.TABLE)
    assert set(trl.SAME) <= ours and len(set(trl.SAME)) == len(trl.SAME)


def test_what_the_answers_name_there_is():
    """A flag that an answer sends one to must be one."""
    ours = {item.name for item in dataclasses.fields(TrainConfig)} | {"help_all"}
    for name, entry in trl.TABLE.items():
        for flag in re.findall(r"--(\w+)", entry.here):
            assert flag in ours | set(trl.TABLE), (name, flag)
        assert "\n" not in entry.here


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        (["--dataset_name", "org/set"], {"train_data": "org/set"}),
        (["--dataset_name", "org/set", "--dataset_train_split", "a"], {"train_data": "org/set:a"}),
        (
            ["--dataset_name", "org/set", "--dataset_test_split", "b"],
            {"train_data": "org/set", "eval_data": "org/set:b"},
        ),
        (["--precompute_ref_log_probs"], {"reference": "precomputed"}),
        (["--precompute_ref_log_probs", "false"], {"reference": "auto"}),
        (["--reference_free", "true"], {"reference": "none"}),
        (["--report_to", "none"], {"report_to": "none"}),
        (["--report_to", "tensorboard"], {"report_to": "tensorboard"}),
        (["--truncation_mode", "keep_start"], {"truncation": "keep_start"}),
        (["--dataloader_num_workers", "3"], {"dataset_num_workers": 3}),
        (["--dataloader_drop_last"], {"tail": "drop"}),
        (["--rpo_alpha", "0.5"], {"sft_weight": 0.5}),
        (["--ref_model", "y"], {"ref_model_name_or_path": "y"}),
        (["--torch_dtype", "bfloat16"], {"bf16": True}),
        (["--dtype", "float32"], {"bf16": False}),
        (["--warmup_ratio", "0.03"], {"warmup_steps": 0.03}),
        (["--eval_strategy", "no"], {"eval_steps": 0}),
        (["--eval_strategy", "steps", "--eval_steps", "0.1"], {"eval_steps": 0.1}),
        (["--eval_strategy", "epoch", "--num_train_epochs", "4"], {"eval_steps": 0.25}),
        (["--save_strategy", "epoch"], {"save_steps": 0}),
        (["--save_strategy", "no"], {"save_steps": 0, "save_minutes": 0}),
        (["--activation-checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], {"gradient_checkpointing": False}),
        (["--test_split_size", "0.2"], {"eval_fraction": 0.2}),
        (["--lora_dropout", "0.0"], {"use_peft": False}),
        (["--optim", "adamw_torch", "--fp16", "false", "--remove-unused-columns", "false"], {"bf16": None}),
        (["--local-rank=0"], {}),
        (["--max_seq_length", "600"], {"max_length": 600}),
        (["--adafactor"], {"optim": "adafactor"}),
        (["--split_batches", "false", "--past_index", "-1", "--router_aux_loss_coef", "0.0"], {"max_length": 1024}),
    ],
)
def test_names_that_are_read(argv, ours, tmp_path):
    config = parse(*argv)
    assert {name: getattr(config, name) for name in ours} == ours
    recipe = dict(zip(("model_name_or_path",), ("x",), strict=True))
    words = iter([word for part in argv for word in part.split("=", 1)] + ["--"])
    name = None
    for item in words:  # the same as a recipe
        if item.startswith("--"):
            name = item[2:].replace("-", "_")
            recipe |= {name: True} if name else {}
        else:
            recipe[name] = yaml.safe_load(item)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert parse_config(TrainConfig, ["--config", str(tmp_path / "r.yaml")], "") == config


def test_deepspeed_is_the_json(tmp_path):
    (tmp_path / "z2.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert parse("--deepspeed", str(tmp_path / "z2.json")).ds_config == str(tmp_path / "z2.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_dropout", "0.05"], "policy and reference would not be the same numbers"),
        (["--neftune_noise_alpha", "5"], "policy and reference differ"),
        (["--dataset_num_proc", "4"], "--dataset_num_workers"),
        (["--load_in_8bit"], "--load_in_4bit"),
        (["--trust_remote_code"], "no code of a model's is ever run"),
        (["--report_to", "comet_ml"], "mlflow, tensorboard, wandb"),
        (["--report_to", "none", "mlflow"], "none stands alone"),
        (["--optim", "lion_8bit"], "allowed: adamw_torch"),
        (["--eval_strategy", "steps"], "needs --eval_steps"),
        (["--save_strategy", "best"], "allowed: no, steps, epoch"),
        (["--eval_strategy", "epoch", "--max_steps", "9"], "does not go with --max_steps"),
        (["--dataset_train_split", "a"], "goes with --dataset_name"),
        (["--dataset_name", "a", "--dataset_train_split", "train[:10]"], "name a whole split"),
        (["--dataset_name", "a", "--train_data", "b"], "--train_data sets too; leave one out"),
        (["--reference_free", "--precompute_ref_log_probs"], "--reference_free sets too; leave one out"),
        (["--torch_dtype", "float16"], "allowed: bfloat16, float32, auto"),
        (["--loss_type", "alphapo"], "choose among sigmoid"),
        (["--fsdp", "full_shard"], "--engine fsdp2"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "in no other way"),
    ],
)
def test_names_that_are_answered(argv, said, capsys):
    assert said in refusal(capsys, *argv)


def test_every_answer_is_one_line_that_begins_with_the_name():
    for name, entry in trl.TABLE.items():
        if entry.kind == trl.ANSWERED:
            with pytest.raises(UserError, match=f"^--{name}: ") as caught:
                trl.translated({name: "x"}, {})
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 160


def test_answers_of_a_recipe_name_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("lora_dropout: 0.1\n")
    with pytest.raises(UserError, match=r"^--config .*r.yaml: --lora_dropout 0.1: "):
        read_recipe(TrainConfig, tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["beta: 0.1\nseed: 1\nbeta: 0.2\n", "max-steps: 1\nmax_steps: 2\n"])
def test_a_recipe_says_each_setting_once(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^--config .*r.yaml: (beta|max_steps) stands twice") as caught:
        read_recipe(TrainConfig, tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_flags_override_a_recipe_under_another_name(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "dataset_name: a\ndataset_train_split: s\nwarmup_ratio: 0.1\neval_strategy: steps\n"
    )
    config = parse(
        "--config", str(tmp_path / "r.yaml"), "--train_data", "b", "--warmup_steps", "3", "--eval_steps", "5"
    )
    assert (config.train_data, config.warmup_steps, config.eval_steps) == ("b", 3, 5)


def test_other_commands_do_not_read_them():
    with pytest.raises(SystemExit):
        parse_config(ScoreConfig, ["--dataset_name", "a"], "")
    assert issubclass(SftConfig, RunConfig)


def test_the_page_is_current():
    assert (ROOT / "docs" / "from_trl.md").read_text() == trl.page(), "python -m diffdpo.cli.trl > docs/from_trl.md"
