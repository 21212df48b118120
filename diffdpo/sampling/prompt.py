"""A prompt's tokens, exactly as training encodes them."""

from collections.abc import Mapping, Sequence

from data_pipeline.encode import Drop, Encoder
from data_pipeline.records import AnswerRecord
from diffdpo.errors import UserError
from diffdpo.models.load import LoadedModel


def encode_prompt(prompt: str | Sequence[Mapping[str, str]], loaded: LoadedModel, template: str = "auto") -> list[int]:
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
