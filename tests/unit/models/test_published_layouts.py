"""The published directories load, and are written back as published."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from diffdpo.errors import UserError
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.load import FAMILIES, load_model, made_config, save_model
from tests.support.published import A2D, CHECKPOINTS, DREAM, ILLADA, LLADA, RAMP, ROWS, tensor_shapes, write


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_directory_loads_and_is_written_back_as_published(name, tmp_path, tokenizer):
    config, model_class, shift = CHECKPOINTS[name]
    tensors = write(tmp_path / "published", config, tokenizer)
    (tmp_path / "published" / "modeling_llada.py").write_text("raise AssertionError('remote code was run')\n")
    loaded = load_model(tmp_path / "published", dtype="bfloat16")
    assert type(loaded.model) is model_class
    mask = config.get("mask_token_id", 5)  # iLLaDA declares none; the published code's is 5
    assert (loaded.spec.logit_shift, loaded.spec.mask_token_id, loaded.spec.terminator_id) == (shift, mask, 1)
    assert loaded.tokenizer.mask_token_id == config.get("mask_token_id")  # id 5 is ordinary text in this tokenizer
    for auto_class in (AutoModel, AutoModelForMaskedLM):
        ours = auto_class.from_pretrained(tmp_path / "published", dtype=torch.bfloat16)
        assert type(ours) is model_class
        assert torch.equal(ours(torch.arange(5, 20)[None]).logits, loaded.model(torch.arange(5, 20)[None]).logits)

    save_model(loaded.model, loaded.tokenizer, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    moving = {"transformers_version", "torch_dtype", "dtype", "use_cache"}  # transformers' own business
    for key in config.keys() - moving:
        assert written.get(key) == config[key], key
    if config["model_type"] == "llada":  # auto_map leads somewhere
        assert (tmp_path / "back" / "modeling_llada.py").is_file()


def test_a_published_folder_saved_onto_itself_gives_the_same_logits(tmp_path, tokenizer):
    write(tmp_path / "published", LLADA, tokenizer)
    ids = torch.arange(5, 20)[None]
    loaded = load_model(tmp_path / "published")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "published")
    assert torch.equal(load_model(tmp_path / "published").model(ids).logits, loaded.model(ids).logits)


@pytest.mark.parametrize("name", ["LLaDA-8B", "Dream-7B", "Tiny-A2D"])
def test_auto_classes_refuse_incomplete_weights(name, tmp_path, tokenizer):
    config, _, _ = CHECKPOINTS[name]
    tensors = write(tmp_path / "published", config, tokenizer, shards=1)
    file = tmp_path / "published" / "model-00001-of-00001.safetensors"
    lost = next(key for key in tensors if key.endswith("q_proj.weight"))
    save_file({key: value for key, value in tensors.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 missing tensors, first {lost}"):
        AutoModel.from_pretrained(tmp_path / "published")
    with pytest.raises(UserError, match=f"1 missing keys, first {lost}"):  # transformers' own way
        AutoModel.from_pretrained(tmp_path / "published", device_map="cpu")


def test_of_the_hub_auto_map_names_the_repository(tmp_path, tokenizer):
    write(tmp_path / "published", LLADA, tokenizer)
    model = load_model(tmp_path / "published").model
    model.name_or_path = "GSAI-ML/LLaDA-8B-Base"
    model.save_pretrained(tmp_path / "back")
    auto_map = json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "GSAI-ML/LLaDA-8B-Base--modeling_llada.LLaDAModelLM"


def test_several_end_tokens(tmp_path, tokenizer):
    write(tmp_path / "published", A2D, tokenizer)
    assert load_model(tmp_path / "published").spec.terminators == {1, 5}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (LLADA, {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq: load the original"),
        (LLADA, {"num_experts": 64}, "num_experts=64"),
        (ILLADA, {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05; supported: no such key"),
        (ILLADA, {"resid_pdrop": 0.1}, "resid_pdrop=0.1; supported: 0.0"),
        (ILLADA, {"head_dim": 16}, "head_dim=16; supported: hidden_size / num_attention_heads = 8"),
        (ILLADA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary scaling 'llama3'"),
        (ILLADA, {"mask_token_id": 1}, "both 1: they must differ"),
        (ILLADA, {"block_size": 4}, "block_size=4; supported: no such key"),
        (ILLADA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            A2D,
            {"block_size": None},
            "does not say how many tokens a block has .0 where attention is full.*add block_size to config.json",
        ),
        (A2D, {"block_size": True}, "block_size=True; expected: a whole number from 0"),
        (A2D, {"block_size": -4}, "block_size=-4"),
        (A2D, {"model_type": "nemotron_labs_diffusion"}, "refused. Nemotron-Labs-Diffusion"),
        (A2D, {"model_type": "llada2_moe_veomni"}, "refused. LLaDA2"),
        (A2D, {"model_type": "llada2_moe", "block_size": 32}, "lacks num_experts"),
        (A2D, {"model_type": "sdar_moe"}, "refused. SDAR with experts"),
        (A2D, {"model_type": "sdar"}, "block_size=0; expected: a whole number from 1"),
        (LLADA, {"block_size": 4}, "block_size=4; supported: no such key"),
        (DREAM, {"bd_size": 32}, "bd_size=32; supported: no such key"),
        (DREAM, {"block_size": 32}, "block_size=32; supported: no such key"),
        (DREAM, {"use_mrope": True}, "use_mrope=True"),
        (DREAM, {"rope_theta": "1e6"}, "rope_theta='1e6'"),
        (DREAM, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3' without low_freq_factor"),
        (DREAM, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        (A2D, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLADA, {"hidden_size": 64}, "d_model=32 and hidden_size=64: they must be equal"),
        (LLADA, {"tie_word_embeddings": True}, "weight_tying=False and tie_word_embeddings=True"),
        (LLADA, {"scale_logit": True, "scale_logits": None}, "scale_logit, which nothing reads: is scale_logits meant"),
        (LLADA, {"scale_logits": "false"}, "scale_logits='false'; expected: bool"),
        (LLADA, {"n_kv_heads": -4}, "n_kv_heads=-4; it must be above 0"),
        (LLADA, {"n_kv_heads": "4"}, "n_kv_heads='4'; expected: int"),
        (LLADA, {"n_kv_heads": 2, "multi_query_attention": False}, "multi_query_attention=False and n_kv_heads=2"),
        (LLADA, {"rope_theta": float("nan")}, "rope_theta=nan; it must be above 0"),
        (LLADA, {"max_sequence_length": -1}, "max_sequence_length=-1"),
        (LLADA, {"clip_qkv": 8.0}, "clip_qkv=8.0; supported: no such key"),
        (LLADA, {"model_type": ["llada"]}, r"model_type \['llada'\]"),
        (DREAM, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (DREAM, {"head_dim": -8}, "head_dim=-8; it must be above 0"),
        (DREAM, {"attention_bias": "no"}, "attention_bias='no'; expected: bool"),
        (
            DREAM,
            {"rope_scaling": RAMP, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            "rope_scaling and rope_parameters with another rope_type",
        ),
        (DREAM, {"rope_scaling": [1]}, r"rope_scaling=\[1\]; expected: dict"),
        (DREAM, {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta=1000000.0 and another one, 500000.0"),
        (DREAM, {"rope_scaling": RAMP | {"factor": "8"}}, "factor='8'; expected: a number above 0"),
        (DREAM, {"rope_scaling": RAMP | {"low_freq_factor": 4.0}}, "low_freq_factor not below high_freq_factor"),
        (DREAM, {"eos_token_id": []}, r"eos_token_id=\[\]"),
        (A2D, {"eos_token_id": [1, 2]}, "both 2: they must differ"),
        (A2D, {"eos_token_id": [1, ROWS]}, f"no token of the vocabulary of {ROWS}"),
    ],
)
def test_relatives_that_compute_something_else_are_refused(config, changes, words, tmp_path, tokenizer):
    write(tmp_path / "published", config, tokenizer, shards=1)
    changed = {key: value for key, value in (config | changes).items() if key not in changes or value is not None}
    (tmp_path / "published" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "published")


@pytest.mark.parametrize("config", [LLADA, ILLADA, DREAM], ids=["llada", "illada", "dream"])
def test_a_missing_key_is_an_error_unless_its_absence_means_the_same(config, tmp_path, tokenizer):
    """Every published key is left out in turn: either loading names it, or the logits are those of the whole config."""
    write(tmp_path / "published", config, tokenizer, shards=1)
    ids = torch.arange(5, 20)[None]
    whole = load_model(tmp_path / "published").model(ids).logits
    named = set()
    for key in config:
        rest = {k: v for k, v in config.items() if k != key}
        (tmp_path / "published" / "config.json").write_text(json.dumps(rest))
        try:
            assert torch.equal(load_model(tmp_path / "published").model(ids).logits, whole), key
        except UserError as error:
            assert key in str(error) or key.replace("_token_id", " token") in str(error)
            named.add(key)
    assert len(named) >= 8


def test_unknown_devices_and_damaged_indices_are_errors(tmp_path, tokenizer):
    write(tmp_path / "published", LLADA, tokenizer)
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        load_model(tmp_path / "published", device="tpu")
    with pytest.raises(UserError, match="device 'meta' is not supported"):
        load_model(tmp_path / "published", device="meta")
    (tmp_path / "published" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_model(tmp_path / "published")


OF_THE_HUB = """
import sys, torch
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.load import FAMILIES, load_model, made_config, save_model
loaded = load_model("org/name")
save_model(loaded.model, loaded.tokenizer, sys.argv[1])
"""


@pytest.mark.slow
def test_a_hub_id_is_read_from_the_hub_s_cache(tmp_path, tokenizer, command, python):
    """Without a network: the cache as the hub's client lays it out, the index and shards as published."""
    snapshot = tmp_path / "home" / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    write(snapshot, DREAM, tokenizer)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    hub = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_HUB_OFFLINE": "1"}
    done = command([python, "-c", OF_THE_HUB, str(tmp_path / "back")], timeout=300, **hub)
    assert done.returncode == 0, done.stderr[-2000:]
    auto_map = json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "org/name--modeling_dream.DreamModel"
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensor_shapes(DREAM).keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_config_makes_transformers_warn_of_what_it_will_not_read(name):
    raw, *_ = CHECKPOINTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made_config(FAMILIES[raw["model_type"]], raw | {"rope_scaling": None}, name)


def test_a_new_model_makes_transformers_warn_of_nothing(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        new_model(tokenizer, width=32, layers=1, heads=2, seed=0)
