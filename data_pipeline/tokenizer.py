"""A model's tokenizer, and the two ids of it that an encoder must know: what ends an answer and what masks a token.

The only home of these rules: ids come from the model's config.json where there is one, else from its tokenizer. Code
that comes with a tokenizer is never run.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.hub import at_revision, in_a_line

Ids = int | list[int] | None


def load_tokenizer(name: str) -> tuple[Any, int | None, int | None]:
    """(tokenizer, terminator, mask) of a model or a tokenizer, from a folder or the hub; DataError when there is none.

    A terminator that is None stands for the tokenizer's eos.
    """
    try:
        tokenizer = read_tokenizer(name)
        config = _model_config(name)
    except DataError as error:
        raise DataError(f"--tokenizer {name!r} cannot be loaded: {error}") from error
    terminator, mask = (first_id(config.get(field)) for field in ("eos_token_id", "mask_token_id"))
    if mask is not None:
        name_mask(tokenizer, mask)
    return tokenizer, terminator, mask


def read_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or on the hub, without running code of its own; ``read_from`` is its ``name``, for who
    saves it. Raises DataError."""
    tokenizer = _read(name)
    tokenizer.read_from = name
    return tokenizer


def _read(name: str) -> Any:
    """As its class reads it.

    Dream's class is such code; its tokenizer is Qwen2's with added tokens. Of any other class that transformers does
    not have, or where none is named, tokenizer.json is read, which holds all that a fast tokenizer is.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        plain, where = at_revision(name)
        named = get_tokenizer_config(plain, **where).get("tokenizer_class")
        loader = Qwen2Tokenizer if named == "DreamTokenizer" else AutoTokenizer
        with _quiet():
            return loader.from_pretrained(plain, trust_remote_code=False, **where)
    except DataError:
        raise
    except Exception as error:  # of many kinds, by what is missing, malformed or would need code of its own
        with suppress(Exception), _quiet():  # damaged as well: the first message says more
            plain, where = at_revision(name)
            return PreTrainedTokenizerFast.from_pretrained(plain, **where)
        raise DataError(f"no tokenizer at {name!r}: {in_a_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns that it does not know the model; the tokenizer is all that is wanted of it."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def first_id(*candidates: Ids) -> int | None:
    """The first id that is given; of a list its first."""
    found = next((candidate for candidate in candidates if candidate not in (None, [])), None)
    return found[0] if isinstance(found, list) else found


def name_mask(tokenizer: Any, mask: int) -> None:
    """Give the tokenizer its mask token (LLaDA's names none). A mask id in the vocabulary's padding gets no name."""
    if mask != tokenizer.mask_token_id and mask < len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(mask)})


def context_length(config: dict) -> int | None:
    """Tokens that a model was made for, as its config.json says; None where that says nothing."""
    names = ("max_sequence_length", "max_position_embeddings", "n_positions")
    return next((int(config[name]) for name in names if config.get(name)), None)


def tokenizer_difference(one: Any, other: Any) -> str:
    """What keeps two models from reading the same ids, in a few words; '' where nothing does."""
    first, second = one.get_vocab(), other.get_vocab()
    if differing := [token for token in sorted(first.keys() | second.keys()) if first.get(token) != second.get(token)]:
        token = differing[0]
        return (
            f"{len(differing)} tokens have different ids, first {token!r}: {first.get(token)} and {second.get(token)}"
        )
    text = "Ein Test: 3 + 4 = 7; naïve 数据\n  x_1 don't"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (one, other)]
    return "" if ids[0] == ids[1] else "the same text becomes different tokens"


def token_id(tokenizer: Any, text: str) -> int:
    """The id of a token given by its text or as a number; DataError when there is none."""
    vocabulary = tokenizer.get_vocab()
    number = vocabulary.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number < max(vocabulary.values()) + 1:
        raise DataError(f"--terminator {text!r} is no token of this tokenizer; give a token's text or id")
    return number


def _model_config(name: str) -> dict:
    """config.json as it stands; empty for a tokenizer on its own. Raises DataError."""
    from transformers.utils import cached_file

    try:
        plain, where = at_revision(name)
        path = cached_file(plain, "config.json", _raise_exceptions_for_missing_entries=False, **where)
        config = json.loads(Path(path).read_bytes()) if path else {}
    except (OSError, ValueError) as error:
        raise DataError(f"config.json cannot be read: {in_a_line(error)}") from error
    if not isinstance(config, dict):
        raise DataError(f"config.json holds no object but {type(config).__name__}")
    return config
