"""A prompt's tokens, exactly as training encodes them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipeline.encode import Drop, Encoder
from data_pipeline.records import AnswerRecord
from diffdpo.errors import UserError
from diffdpo.models.load import LoadedModel

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or chat messages with ``role`` and ``content``."""


def prompts_of(prompts: Any) -> list[Prompt]:
    """Each prompt of a caller, who may give one text alone. UserError for what is no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise UserError(f"prompts are a {type(prompts).__name__}; give a text, or a list of texts or chats")
    each = list(prompts)
    if each and all(isinstance(one, Mapping) for one in each):
        raise UserError("prompts are messages; a chat is a list of them, and prompts a list of chats: [[{...}, {...}]]")
    for number, prompt in enumerate(each, start=1):
        if not isinstance(prompt, str):
            _check_chat(prompt, f"prompt {number}")
    return each


def _check_chat(prompt: Any, where: str) -> None:
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise UserError(f"{where} is {prompt!r}; give a text or a list of messages")
    for message in prompt:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} has the message {message!r}; a message has a role and a content, both texts")


def encode_prompt(prompt: Prompt, loaded: LoadedModel, template: str = "auto") -> list[int]:
    """Tokens of a text or of chat messages; ``template``: auto (chat where the tokenizer has one), chat or plain.

    UserError for a prompt that training would leave out.
    """
    kind = loaded.spec.template if template == "auto" else template
    encoder = Encoder(loaded.tokenizer, max_length=1_000_000, template=kind, terminator=loaded.spec.terminator_id)
    text = prompt if isinstance(prompt, str) else tuple(prompt)
    pair = encoder(AnswerRecord(id="", prompt=text, answer="x", label=True, meta={}))  # type: ignore[arg-type]
    if isinstance(pair, Drop):
        raise UserError(f"a prompt cannot be used ({pair.reason}): {pair.detail}")
    assert pair.chosen is not None  # label=True
    return pair.chosen.ids[: pair.chosen.prompt_length].tolist()
