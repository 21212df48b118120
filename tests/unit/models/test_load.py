import filecmp
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffdpo.errors import UserError
from diffdpo.models.architecture.dream import DreamModel
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.architecture.llada import LLaDAModelLM
from diffdpo.models.checkpoint.weights import shard_files
from diffdpo.models.load import load_model, save_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.scores.masked_log_probs import MaskedLogProbs


@pytest.fixture
def directory(tmp_path, model, tokenizer):
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory, **changes):
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def scores(loaded):
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 0, 1]), torch.tensor([3, 5, 7]), torch.tensor([9, 10, 11])
    return MaskedLogProbs(loaded.model, loaded.spec)(ids, torch.tensor([9, 8]), *where)


def test_a_setting_of_the_config_may_be_false(tiny_model, tmp_path):
    """``from_pretrained(..., scale_logits=False)`` is another model than the one whose config says True."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"scale_logits": True}))
    assert LLaDAModelLM.from_pretrained(tmp_path / "model").config.scale_logits is True
    assert LLaDAModelLM.from_pretrained(tmp_path / "model", scale_logits=False).config.scale_logits is False


def test_a_save_that_fails_leaves_the_model_that_was_there(tiny_model, tmp_path):
    loaded = load_model(str(tiny_model))
    loaded.model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(ValueError, match="not supported"):
        loaded.model.save_pretrained(tmp_path, max_shard_size="5XB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded.model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists() and (tmp_path / "model.safetensors").is_file()


def test_save_load_save_gives_identical_bytes_and_scores(directory, tmp_path):
    first = load_model(str(directory), dtype="float64")
    save_model(first.model, first.tokenizer, tmp_path / "again")
    second = load_model(str(tmp_path / "again"), dtype="float64")
    assert torch.equal(scores(first), scores(second))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert filecmp.cmp(directory / name, tmp_path / "again" / name, shallow=False), name


def test_spec_of_a_llada(directory, tokenizer):
    spec = load_model(str(directory)).spec
    assert (spec.name, spec.logit_shift, spec.block_class) == ("llada", 0, "LLaDABlock")
    assert (spec.mask_token_id, spec.terminator_id) == (tokenizer.mask_token_id, tokenizer.eos_token_id)


def test_sharded_checkpoint_with_tensors_spread_over_shards(directory, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, sharded = (load_model(str(path), dtype="float64") for path in (directory, tmp_path / "shards"))
    assert torch.equal(scores(whole), scores(sharded))


@pytest.mark.parametrize(("first", "second"), [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "30KB")])
def test_a_model_saved_over_another_is_the_one_that_is_read(first, second, tmp_path, model, tokenizer):
    save_model(new_model(tokenizer, width=32, layers=3, heads=4, seed=1), tokenizer, tmp_path, max_shard_size=first)
    save_model(model, tokenizer, tmp_path, max_shard_size=second)
    ids = torch.arange(5, 17)[None]
    again = load_model(tmp_path, dtype="float64").model(ids).logits
    assert torch.allclose(again, model(ids).logits, rtol=0, atol=1e-12)  # one with a graph, one without
    assert len(list(tmp_path.glob("*.safetensors"))) == len(shard_files(tmp_path))  # nothing else is left behind


def test_a_model_and_an_adapter_do_not_share_a_folder(directory, tmp_path):
    loaded = load_model(directory)
    adapted = add_lora(load_model(directory).model, loaded.spec, r=2)
    with pytest.raises(UserError, match="holds a model, which the adapter would hide"):
        save_model(adapted, loaded.tokenizer, directory)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match="holds an adapter, which would hide the model"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "adapter")


def test_mask_token_the_tokenizer_does_not_name_is_registered(directory):
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["mask_token"]
    path.write_text(json.dumps(settings))
    loaded = load_model(str(directory))
    assert loaded.tokenizer.mask_token_id == loaded.spec.mask_token_id
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token_id": 40}, r"mask_token_id 40 and the tokenizer's mask token '<\|mdm_mask\|>' is 2"),
        ({"eos_token_id": 40}, r"eos_token_id 40, ordinary text, .* end token '<\|endoftext\|>' is 1"),
    ],
)
def test_ids_that_contradict_the_tokenizer_are_an_error(directory, changes, words):
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=words):
        load_model(str(directory))


def test_another_end_among_the_added_tokens_is_a_habit(directory):
    edit_config(
        directory, eos_token_id=0
    )  # as chat models whose config.json ends at <|endoftext|>, the tokenizer's turn
    assert load_model(str(directory)).spec.terminator_id == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "supported: llada"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"block_type": "sequential"}, "block_type"),
        ({"weight_tying": False}, "1 missing tensors, first model.transformer.ff_out.weight"),
        ({"n_layers": 3}, "missing tensors, first model.transformer.blocks.2"),
        ({"n_layers": 1}, "unexpected tensor model.transformer.blocks.1"),
        ({"mlp_hidden_size": 64}, "has shape .*config.json says"),
        ({"mask_token_id": 1}, "must differ"),
    ],
)
def test_a_checkpoint_that_contradicts_its_config_is_an_error(directory, changes, words):
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=words):
        load_model(str(directory))


def test_user_errors(directory, tmp_path):
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_model(str(directory), dtype="int8")
    with pytest.raises(UserError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    shutil.copy(directory / "config.json", tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer"):
        load_model(str(tmp_path / "bare"))
    shutil.copy(directory / "tokenizer.json", tmp_path / "bare")
    shutil.copy(directory / "tokenizer_config.json", tmp_path / "bare")
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(str(tmp_path / "bare"))


def test_a_missing_shard_is_named(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of.* is missing"):
        load_model(str(tmp_path))


def test_a_loaded_model_survives_its_directory_being_overwritten(directory):
    loaded = load_model(str(directory), dtype="float64")
    before = scores(loaded)
    path = directory / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(scores(loaded), before)


def test_truncated_weights_are_an_error(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(str(directory))


def test_more_tokens_than_rows_is_an_error(directory, tokenizer):
    settings = json.loads((directory / "tokenizer.json").read_text())
    size = len(tokenizer)
    token = {"content": "<extra>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    settings["added_tokens"].append(token | {"id": size, "normalized": False})
    (directory / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="resize_token_embeddings"):
        load_model(str(directory))


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
AUTOREGRESSIVE = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
}


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_autoregressive_layouts_equal_transformers_without_its_causal_mask(name, tmp_path, tokenizer):
    config_class, model_class, extra = AUTOREGRESSIVE[name]
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), **SHAPE, **extra)
    config._attn_implementation = "eager"
    published = model_class(config).eval()
    for parameter in published.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert isinstance(loaded.model, DreamModel)
    assert (loaded.spec.logit_shift, loaded.spec.mask_token_id) == (1, tokenizer.mask_token_id)
    ids = torch.arange(5, 17)[None]
    everything_visible = torch.zeros(1, 1, 12, 12)
    expected = published(ids, attention_mask=everything_visible).logits
    assert torch.allclose(loaded.model(ids).logits, expected, atol=2e-5)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "back")  # and transformers reads ours
    again = model_class.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert torch.equal(again(ids, attention_mask=everything_visible).logits, expected)


def test_dream_directory_with_its_own_tokenizer_class(tmp_path):
    from diffdpo.models.architecture.dream import DreamConfig

    pieces = ["<|endoftext|>", "<|mask|>", "<|im_end|>", "a", "b", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces[3:])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {str(3 + i): {"content": token, "special": True} for i, token in enumerate(pieces[:3])}
    settings = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added, "mask_token": "<|mask|>"}
    remote = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | remote))
    shape = {**SHAPE, "vocab_size": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = DreamModel(DreamConfig(**shape | {"mask_token_id": 4, "eos_token_id": 3}, architectures=["DreamModel"]))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.tokenizer.encode("abb") == [2, 1]
    assert (loaded.spec.name, loaded.spec.mask_token_id, loaded.spec.stop_token_ids) == ("Dream", 4, (5,))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"} <= names
    assert "model.layers.0.self_attn.o_proj.bias" not in names


def test_logit_shift_can_be_set_in_the_config(tmp_path, tokenizer):
    published = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SHAPE))
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path, logit_shift=0)
    assert load_model(str(tmp_path)).spec.logit_shift == 0


def test_weights_stored_in_bf16_load_in_any_dtype(directory):
    weights = load_file(directory / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    wide, narrow = (load_model(str(directory), dtype=dtype).model for dtype in ("float32", "bfloat16"))
    assert torch.equal(wide.head.weight, narrow.head.weight.float())
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_random_models_are_a_function_of_their_seed(tokenizer):
    one, same, other = (new_model(tokenizer, width=32, layers=1, heads=2, seed=seed) for seed in (1, 1, 2))
    assert isinstance(one, LLaDAModelLM)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_as_torch_prints_it_is_read(tiny_model, tmp_path, key):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "torch.bfloat16"}))
    assert load_model(folder).model.dtype == torch.float32


def test_a_value_that_transformers_cannot_take_is_one_line(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat61"}))
    with pytest.raises(UserError, match=r"config.json cannot be used: .*bfloat61") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
