import json

import pytest

LLADA_8B = {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "block_type": "llama",
    "weight_tying": False,
    "include_qkv_bias": False,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 500,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "mask_token_id": 499,
    "eos_token_id": 498,
}


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """``write_config(dict)`` → path of a config.json."""

    def write(content: dict) -> str:
        path = tmp_path_factory.mktemp("shape") / "config.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture(scope="session")
def llada_8b(write_config) -> str:
    """config.json of LLaDA-8B."""
    return write_config(LLADA_8B)


@pytest.fixture(scope="session")
def small(write_config) -> str:
    """config.json of a small LLaDA."""
    return write_config(
        LLADA_8B
        | {"d_model": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 352}
        | {"vocab_size": 1024, "embedding_size": 1024, "mask_token_id": 5, "eos_token_id": 6, "pad_token_id": 6}
    )
