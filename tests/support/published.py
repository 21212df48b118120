"""Miniatures of the published directories: the same files, names and config keys, smaller sizes.

Written from the layout descriptions, not by this package: config.json with every published key (also those that mean
nothing or mislead, such as `mlp_ratio`), shards with an index, a tokenizer that names no mask token.
"""

import json

import torch
from safetensors.torch import save_file

from diffdpo.models.architecture.dream import A2DLlamaLMHeadModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel, DreamModel
from diffdpo.models.architecture.illada import ILLaDAForCausalLM
from diffdpo.models.architecture.llada import LLaDAModelLM

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
