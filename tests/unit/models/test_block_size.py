"""How many tokens a block has is said once: by config.json, a flag, or an adapter that was trained with it."""

import json

import pytest

from diffdpo.cli.main import main
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.adapter_folder import note_base
from diffdpo.models.load import load_model, load_tokenizer_and_spec, model_context, read_config, save_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.sampling.decode import sample
from tests.support.block_reference import published

PAIR = {"id": "a", "prompt": "w5 w6 w7", "chosen": "w8 w9 w10 w11 w12", "rejected": "w13"}


@pytest.fixture
def silent(tmp_path):
    """A checkpoint that does not say it."""
    published(tmp_path / "a2d", "a2d-qwen3", 4, block_size=...)
    return tmp_path / "a2d"


@pytest.fixture
def adapter(silent, tmp_path):
    """An adapter on it, trained in blocks of 4."""
    loaded = load_model(silent, block_size=4)
    save_model(add_lora(loaded.model, loaded.spec, r=2), loaded.tokenizer, tmp_path / "adapter")
    note_base(tmp_path / "adapter", block_size=4)
    return tmp_path / "adapter"


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"id": "b"}) + "\n")
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        ("sdar", {"block_size": 4, "bd_size": 32}, "bd_size=32 and block_size=4"),
        ("sdar", {"block_size": ..., "bd_size": 8}, "bd_size=8 and no block_size"),
        ("a2d-qwen3", {"block_size": ..., "bd_size": 8}, "bd_size=8 and no block_size"),
        ("Fast_dLLM_Qwen", {"bd_size": 8, "block_size": 4}, "bd_size=8 and block_size=4"),
    ],
)
def test_two_sizes_in_a_config_are_refused(tmp_path, family, given, said):
    published(tmp_path / "model", family, 4, **given)
    with pytest.raises(UserError, match=said):
        read_config(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "given"), [("sdar", {"bd_size": 4}), ("Fast_dLLM_Qwen", {"bd_size": ..., "block_size": 8})]
)
def test_a_flag_against_either_key_is_refused_by_the_key_that_is_there(tmp_path, family, given):
    published(tmp_path / "model", family, 4, **given)
    size = given.get("block_size", 4)
    with pytest.raises(UserError, match=f"--block_size 2: config.json has (block|bd)_size={size}"):
        read_config(str(tmp_path / "model"), block_size=2)


def test_an_adapter_remembers_it(adapter):
    assert load_model(adapter).spec.block_size == 4
    assert load_tokenizer_and_spec(str(adapter))[1].block_size == 4
    assert model_context(str(adapter)) == model_context(str(adapter), block_size=4)
    for ask in (load_model, load_tokenizer_and_spec, model_context):
        with pytest.raises(UserError, match=r"--block_size 8: the adapter .* was trained with 4"):
            ask(str(adapter), block_size=8)


def test_scores_of_two_sizes_do_not_meet_in_one_file(silent, pairs, tmp_path, capsys):
    words = ["score", "--model_name_or_path", str(silent), "--pairs", str(pairs), "--output", str(tmp_path / "s.jsonl")]
    main([*words, "--block_size", "4"])
    assert "scores exact (the 15 masks of a block of 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="was written with --block_size 4"):
        main([*words, "--block_size", "0"])
    with pytest.raises(UserError, match="was written with --fill_last_block"):
        main([*words, "--block_size", "4", "--fill_last_block", "true"])


def test_evaluation_and_pairs_can_be_told(silent, pairs, tmp_path):
    asked = ["--model_name_or_path", str(silent), "--block_size", "4"]
    told = ["evaluate", *asked, "--pairs", str(pairs), "--output", str(tmp_path / "e.json"), "--tracking_uri", "none"]
    main(told)
    made = ["make-pairs", *asked, "--prompts", str(pairs), "--verifier", "none", "--gen_length", "9"]
    main([*made, "--num_samples", "2", "--output_dir", str(tmp_path / "made")])
    assert len((tmp_path / "made/answers.jsonl").read_text().splitlines()) == 2  # one prompt, asked once
    with pytest.raises(UserError, match="give --block_size"):
        main([*told[:3], *told[5:]])


@pytest.mark.parametrize("length", [33, 36, 40])
def test_an_answer_region_need_not_be_whole_blocks(tmp_path, length):
    published(tmp_path / "model", "sdar", 4)
    loaded = load_model(tmp_path / "model")
    (answer,) = sample(loaded.model, loaded.spec, [[5, 6, 7]], gen_length=length, steps=length, on_eos="forbid")
    assert len(answer) == length


def test_nulls_of_a_config_come_back_and_none_is_added(tmp_path):
    published(tmp_path / "model", "sdar", 4, bos_token_id=None, use_sliding_window=False)
    loaded = load_model(tmp_path / "model")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "saved"))
    assert {key for key, value in after.items() if value is None} == {
        key for key, value in before.items() if value is None
    }
    assert "bos_token_id" in after and "sliding_window" in after
    again = load_model(tmp_path / "saved")
    save_model(again.model, again.tokenizer, tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_bytes() == (tmp_path / "saved/config.json").read_bytes()
