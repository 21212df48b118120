"""A block diffusion model made by launch/sft.py, scored, trained from preferences and sampled from."""

import json
import shutil

import pytest

MADE = "--block_size 4 --width 32 --layers 2 --heads 2 --vocab_size 300 --max_length 96 --max_prompt_length 48"
FEW = "--tracking_uri none --num_eval_problems 2 --max_eval_pairs 4 --per_device_train_batch_size 2 --max_steps 2"


@pytest.fixture(scope="module")
def made(command, python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    done = command(
        [python, "launch/sft.py", *f"{MADE} {FEW} --num_generated_answers 64 --output_dir {folder}/sft".split()],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "sft" / "final"


def test_it_is_saved_as_sdar_and_scored_exactly(made, command, python, pairs_file):
    config = json.loads((made / "config.json").read_text())
    assert (config["model_type"], config["block_size"], config["architectures"]) == ("sdar", 4, ["SDARForCausalLM"])
    words = f"--model_name_or_path {made} --pairs {pairs_file} --max_length 96 --max_prompt_length 48"
    done = command([python, "launch/score.py", *f"{words} --score_estimator exact".split()], timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 64 and all(line["chosen"]["stderr"] == 0 and line["chosen"]["score"] < 0 for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--use_peft true --reference adapter_off", "exact (the 15 masks of a block of 4"),
        (
            "--reference precomputed --score_estimator balanced --segmentation deferred --segment_rows 3",
            "balanced, n = 4",
        ),
        ("--reference copy --score_estimator mask_count --segmentation two_pass --segment_rows 2", "mask_count, n = 4"),
    ],
)
def test_preference_training_starts_at_ln_2(made, command, python, pairs_file, tmp_path, options, words):
    lengths = "--eval_fraction 0.1 --max_length 96 --max_prompt_length 48"
    rest = f"--train_data {pairs_file} {lengths} --output_dir {tmp_path}/o"
    done = command(
        [python, "launch/train.py", *f"--model_name_or_path {made} {FEW} {rest} {options}".split()], timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first = json.loads((tmp_path / "o" / "metrics.jsonl").read_text().splitlines()[0])
    assert words in done.stdout and "ln 2 as it must be" in done.stdout and "WARNING" not in done.stdout
    assert first is not None


def test_it_writes_answers(made, command, python):
    words = f"--model_name_or_path {made} --gen_length 16 --prompt".split()
    done = command([python, "launch/generate.py", *words, "2 + 3 ="], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    done = command([python, "launch/generate.py", *words, "2 + 3 =", "--block_length", "8"], timeout=300)
    assert done.returncode == 2 and "blocks of 4 tokens, not of 8" in done.stderr


def test_a_named_model_has_its_own_blocks(made, command, python):
    done = command([python, "launch/sft.py", "--model_name_or_path", str(made), "--block_size", "8"], timeout=120)
    assert done.returncode == 2 and "--block_size 8: config.json has block_size=4" in done.stderr


@pytest.fixture(scope="module")
def undeclared(made, tmp_path_factory):
    """The same weights under the name that full-attention and block-causal checkpoints share, blocks not declared."""
    folder = tmp_path_factory.mktemp("undeclared") / "model"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "a2d-qwen3"}
    del config["block_size"], config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scores(command, python, model, pairs_file, *options):
    words = f"--model_name_or_path {model} --pairs {pairs_file} --max_length 96 --max_prompt_length 48"
    done = command([python, "launch/score.py", *words.split(), "--score_estimator", "exact", *options], timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done, [line["chosen"]["score"] for line in lines]


@pytest.mark.slow
def test_blocks_that_config_json_does_not_declare(made, undeclared, command, python, pairs_file, tmp_path):
    done, _ = scores(command, python, undeclared, pairs_file)
    assert done.returncode == 2 and "give --block_size" in done.stderr
    given = scores(command, python, undeclared, pairs_file, "--block_size", "4")[1]
    assert given and given == scores(command, python, made, pairs_file)[1]
    rest = f"--train_data {pairs_file} --max_length 96 --max_prompt_length 48 --output_dir {tmp_path}/o --block_size 4"
    done = command([python, "launch/train.py", *f"--model_name_or_path {undeclared} {FEW} {rest}".split()], timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "o" / "final" / "config.json").read_text())["block_size"] == 4
    words = f"--model_name_or_path {undeclared} --gen_length 8 --prompt 2".split()
    assert command([python, "launch/generate.py", *words], timeout=300).returncode == 2
    assert command([python, "launch/generate.py", *words, "--block_size", "4"], timeout=300).returncode == 0
