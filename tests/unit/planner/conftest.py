import json

import pytest

from tests.support.shapes import LLADA_8B


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
