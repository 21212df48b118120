"""A model's tokenizer, and the two ids of it that an encoder must know: what ends an answer and what masks a token.

The rules are those of training: ids come from the model's config.json, where there is one, else from its tokenizer.
"""

from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.hub import in_a_line, only_kept


def load_tokenizer(name: str) -> tuple[Any, int | None, int | None]:
    """(tokenizer, terminator, mask) of a model or a tokenizer, from a folder or the hub; DataError when there is none.

    A terminator that is None stands for the tokenizer's eos.
    """
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        kept = only_kept(name)
        named = get_tokenizer_config(name, local_files_only=kept).get("tokenizer_class")
        loader = Qwen2Tokenizer if named == "DreamTokenizer" else AutoTokenizer  # Dream's is Qwen2's with added tokens
        tokenizer = loader.from_pretrained(name, local_files_only=kept)
        config = _model_config(name, kept)
    except (DataError, OSError, ValueError, KeyError) as error:
        raise DataError(f"--tokenizer {name!r} cannot be loaded: {in_a_line(error)}") from error
    terminator, mask = (_first_id(config.get(field)) for field in ("eos_token_id", "mask_token_id"))
    if mask is not None and mask != tokenizer.mask_token_id and mask < len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(mask)})
    return tokenizer, terminator, mask


def token_id(tokenizer: Any, text: str) -> int:
    """The id of a token given by its text or as a number; DataError when there is none."""
    vocabulary = tokenizer.get_vocab()
    number = vocabulary.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number < max(vocabulary.values()) + 1:
        raise DataError(f"--terminator {text!r} is no token of this tokenizer; give a token's text or id")
    return number


def _model_config(name: str, kept: bool) -> dict:
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(name, local_files_only=kept)[0]
    except OSError:  # a tokenizer on its own
        return {}


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
