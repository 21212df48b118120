"""Miniatures of the published directories: the same files, names and config keys, smaller sizes.

Written from the layout descriptions, not by this package: config.json with every published key (also those that mean
nothing or mislead, such as `mlp_ratio`), shards with an index, a tokenizer that names no mask token.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from diffdpo.errors import UserError
from diffdpo.models.architecture.dream import A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel, DreamModel
from diffdpo.models.architecture.illada import ILLaDAForCausalLM
from diffdpo.models.architecture.llada import LLaDAModelLM
from diffdpo.models.load import load_model, save_model

ROWS = 320
LLADA = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": ROWS, "eos_token_id": 1, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 2, "max_sequence_length": 4096, "mlp_hidden_size": 48,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 2, "pad_token_id": 1, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": ROWS, "weight_tying": False,
}  # fmt: skip
DREAM = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "mask_token_id": 2, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": ROWS,
}  # fmt: skip
A2D = {
    "architectures": ["A2DQwen3LMHeadModel"], "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": [1, 5], "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "a2d-qwen3", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 1, "mask_token_id": 2, "rms_norm_eps": 1e-06,
    "block_size": 0, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "transformers_version": "4.57.0", "use_cache": True, "use_sliding_window": False, "vocab_size": ROWS,
}  # fmt: skip
RAMP = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
A2D_QWEN2 = {key: value for key, value in A2D.items() if key not in ("attention_bias", "head_dim")}
A2D_QWEN2 |= {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"]}
ILLADA = {
    "architectures": ["ILLaDAForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModel": "modeling_illada.ILLaDAForCausalLM",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "layer_norm_eps": None, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "illada", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 1, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": False,
    "vocab_size": ROWS,
}  # fmt: skip
CHECKPOINTS = {
    "LLaDA-8B": (LLADA, LLaDAModelLM, 0),
    "LLaDA, tied head, grouped queries": (LLADA | {"weight_tying": True, "n_kv_heads": 2}, LLaDAModelLM, 0),
    "LLaDA, padded vocabulary": (LLADA | {"vocab_size": ROWS - 20}, LLaDAModelLM, 0),
    "iLLaDA-8B": (ILLADA, ILLaDAForCausalLM, 0),
    "Dream-7B": (DREAM, DreamModel, 1),
    "Tiny-A2D": (A2D, A2DQwen3LMHeadModel, 0),
    "A2D of Qwen2": (A2D_QWEN2, A2DQwen2LMHeadModel, 0),
    "A2D of Llama": (
        A2D | {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"]},
        A2DLlamaLMHeadModel,
        0,
    ),
}


def tensor_shapes(config):
    """Published names and shapes of a checkpoint's tensors."""
    if config["model_type"] == "llada":
        size, mlp, top = config["d_model"], config["mlp_hidden_size"], "model.transformer."
        kv = size // config["n_heads"] * config["n_kv_heads"]
        shapes = {top + "wte": (config["embedding_size"], size), top + "ln_f": (size,)}
        if not config["weight_tying"]:
            shapes[top + "ff_out"] = (config["embedding_size"], size)
        block = {"q_proj": (size, size), "k_proj": (kv, size), "v_proj": (kv, size), "attn_out": (size, size)}
        block |= {"ff_proj": (mlp, size), "up_proj": (mlp, size), "ff_out": (size, mlp)}
        block |= {"attn_norm": (size,), "ff_norm": (size,)}
        prefix, layers = top + "blocks.", config["n_layers"]
    else:
        size, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        head = config.get("head_dim") or size // heads
        wide, kv = head * heads, head * config["num_key_value_heads"]
        shapes = {"model.embed_tokens": (config["vocab_size"], size), "model.norm": (size,)}
        if not config["tie_word_embeddings"]:
            shapes["lm_head"] = (config["vocab_size"], size)
        block = {"self_attn.q_proj": (wide, size), "self_attn.k_proj": (kv, size), "self_attn.v_proj": (kv, size)}
        block |= {"self_attn.o_proj": (size, wide), "mlp.gate_proj": (mlp, size), "mlp.up_proj": (mlp, size)}
        block |= {"mlp.down_proj": (size, mlp), "input_layernorm": (size,), "post_attention_layernorm": (size,)}
        if "qwen3" in config["model_type"]:
            block |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        prefix, layers = "model.layers.", config["num_hidden_layers"]
    shapes |= {f"{prefix}{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    named = {f"{name}.weight": shape for name, shape in shapes.items()}
    if config["model_type"] in ("Dream", "a2d-qwen2"):
        biased = [name for name in shapes if name.endswith(("q_proj", "k_proj", "v_proj"))]
        named |= {f"{name}.bias": shapes[name][:1] for name in biased}
    return named


def write(folder, config, tokenizer, *, shards=3):
    """A published directory; tensors of a layer are spread over the shards."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2 + ("norm" in name or "ln_f" in name)).bfloat16()
        for name, shape in tensor_shapes(config).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "mask_token"}))
    return tensors


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
from diffdpo.models.load import load_model, save_model
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
