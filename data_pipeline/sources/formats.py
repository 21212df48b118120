"""Rows of the field's data sets → records. A row's format is seen from its columns, or named with ``--format``.

| format        | columns                                                                                        |
|---------------|------------------------------------------------------------------------------------------------|
| preference    | prompt, chosen, rejected: strings or messages; also chosen/rejected that repeat the prompt     |
| implicit      | chosen, rejected: two whole texts or conversations; the common beginning is the prompt         |
| hh            | chosen, rejected: two transcripts ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (prompt optional)  |
| unpaired      | prompt, completion, label (KTO), or is_correct in its place                                     |
| answer        | prompt, completion | question, answer | messages: one good answer (SFT)                        |
| candidates    | a question with several answers, each right or wrong (see ``candidates.py``)                   |

Sources: TRL's ``dataset_formats`` page; the hh-rlhf, ultrafeedback_binarized and grade-school-math releases.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.records import (
    GRADES,
    LABELS,
    AnswerRecord,
    Message,
    PreferenceRecord,
    Record,
    RecordError,
    Text,
    answer_label,
    as_text,
    assistant_turn,
    missing_field,
    require,
    user_turn,
    with_id,
)
from data_pipeline.sources.candidates import Pairing, candidate_records, has_candidates, is_long

FORMATS = ("auto", "preference", "implicit", "hh", "unpaired", "answer", "candidates")
HH_TURN = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")  # at the beginning the empty line may have been stripped
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
META_COLUMNS = ("source", "score_chosen", "score_rejected", "prompt_id")


def detect_format(row: dict) -> str:
    """The format of a row, from its columns and their types. Raises RecordError when none fits."""
    if has_candidates(row):
        return "candidates"
    if "chosen" in row or "rejected" in row:
        first = row.get("prompt", row.get("chosen"))
        if isinstance(first, str) and isinstance(row.get("chosen"), str) and _is_transcript(first, "prompt" not in row):
            return "hh"
        return "preference" if "prompt" in row else "implicit"
    if "label" in row or is_long(row):
        return "unpaired"
    if "messages" in row or ("question" in row and "answer" in row):
        return "answer"
    if "prompt" in row:
        return "answer" if "completion" in row or "answer" in row else "preference"
    raise missing_field("answer" if "question" in row else "prompt", row)


def _is_transcript(text: str, whole: bool) -> bool:
    """Whether a text begins with a turn. One without the empty line before it may be somebody's own prompt, such as
    ``Human: Hi``; then a second turn tells. A ``whole`` text is never anything else: with turns that cannot be told it
    is counted, for splitting it by characters would end inside the answer."""
    begins = HH_TURN.match(text) is not None
    return begins and (whole or text.startswith("\n\n") or len(HH_TURN.findall(text)) > 1)


def convert(row: dict, *, format: str = "auto", pairing: Pairing | None = None) -> Iterator[Record]:
    """The records of one row: one, or for ``candidates`` any number. Raises RecordError."""
    name = detect_format(row) if format == "auto" else format
    if name == "candidates":
        yield from candidate_records(row, pairing or Pairing())
    else:
        yield CONVERTERS[name](row)


# ------------------------------------------------------------------------------------------------ converters


def _preference(row: dict) -> Record:
    """Explicit prompt. In the layout of UltraFeedback-binarized chosen and rejected repeat the prompt as first turn."""
    prompt, chosen, rejected = (as_text(require(row, name), name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, tuple) != isinstance(rejected, tuple):
        raise RecordError("wrong_type", "one of chosen and rejected is text, the other messages", malformed=True)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        if isinstance(prompt, str):
            prompt = _repeated_prompt(prompt, chosen, rejected)
        chosen, rejected = (
            side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected)
        )
        _one_answer(chosen, rejected)
    elif isinstance(prompt, tuple):
        chosen, rejected = (assistant_turn(str(side)) for side in (chosen, rejected))
    return with_id(PreferenceRecord("", prompt, chosen, rejected, _meta(row)), row.get("id"))


def _repeated_prompt(prompt: str, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns both sides share, when they repeat the prompt column; else the prompt as one user turn."""
    shared = _common_turns(chosen, rejected)
    if any(turn["content"].strip() == prompt.strip() for turn in shared):
        return shared
    return user_turn(prompt)


def _implicit(row: dict) -> Record:
    """No prompt column: the prompt is what both sides begin with."""
    chosen, rejected = (as_text(require(row, name), name) for name in ("chosen", "rejected"))
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt: Text = _common_turns(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _one_answer(chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_words(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt.strip():
            raise RecordError("no_prompt", "there is no field 'prompt', and chosen and rejected share no first words")
    else:
        raise RecordError("wrong_type", "one of chosen and rejected is text, the other messages", malformed=True)
    return with_id(PreferenceRecord("", prompt, chosen, rejected, _meta(row)), row.get("id"))


def _common_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The leading turns that are equal, leaving each side its last turn."""
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    count = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    return chosen[:count]


def _common_words(chosen: str, rejected: str) -> int:
    """Length of the longest common beginning that ends between words (white space stays with what follows)."""
    limit = min(len(chosen), len(rejected))
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while cut and not chosen[cut : cut + 1].isspace() and not rejected[cut : cut + 1].isspace():
        cut -= 1
    return cut


def _one_answer(*sides: tuple[Message, ...]) -> None:
    """Each side must be one assistant turn: what comes after a diverging turn is no answer to the same prompt."""
    for side in sides:
        if len(side) != 1 or side[0]["role"] != "assistant":
            turns = ", ".join(turn["role"] for turn in side) or "nothing"
            raise RecordError("not_one_answer", f"after the common turns stands not one assistant turn but {turns}")


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript, contents stripped. Raises RecordError when it is none."""
    head, *rest = HH_TURN.split(text)
    if head.strip() or not rest:
        raise RecordError("not_a_transcript", "the text does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        {"role": HH_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    )


def _transcript(row: dict, name: str) -> str:
    text = require(row, name)
    if not isinstance(text, str):
        raise RecordError("wrong_type", f"field {name!r} is {type(text).__name__}, not a transcript", malformed=True)
    return text


def _hh(row: dict) -> Record:
    """Anthropic's transcripts, whole or with the prompt cut off at the last ``Assistant:``.

    The split is by turns. The longest common character prefix, used elsewhere, ends inside the answer for 19 % of
    the pairs, because both answers often begin with the same words.
    """
    texts = [_transcript(row, name) for name in ("chosen", "rejected")]
    if row.get("prompt") is not None:
        prompt = parse_transcript(_transcript(row, "prompt"))
        if prompt[-1] == {"role": "assistant", "content": ""}:
            prompt = prompt[:-1]
        chosen, rejected = (assistant_turn(text.strip()) for text in texts)
    else:
        whole, other = (parse_transcript(text) for text in texts)
        prompt = _common_turns(whole, other)
        chosen, rejected = whole[len(prompt) :], other[len(prompt) :]
        _one_answer(chosen, rejected)
    if not prompt or prompt[-1]["role"] != "user":
        raise RecordError("prompt_without_question", "the last turn of the prompt is not the human's")
    return with_id(PreferenceRecord("", prompt, chosen, rejected, _meta(row)), row.get("id"))


def _unpaired(row: dict) -> Record:
    label = answer_label(row, LABELS)
    if label is None:
        raise missing_field("label", row)
    return with_id(AnswerRecord("", *_prompt_and_answer(row), label, _meta(row)), row.get("id"))


def _answer(row: dict) -> Record:
    """A good answer, unless the row says that it is wrong."""
    label = answer_label(row, GRADES) is not False
    return with_id(AnswerRecord("", *_prompt_and_answer(row), label, _meta(row)), row.get("id"))


def _prompt_and_answer(row: dict) -> tuple[Text, Text]:
    if "messages" in row:
        messages = as_text(require(row, "messages"), "messages")
        if not isinstance(messages, tuple) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RecordError("not_one_answer", "'messages' does not end with an assistant turn after a user turn")
        return messages[:-1], messages[-1:]
    prompt_name = "prompt" if "prompt" in row or "question" not in row else "question"
    answer_name = "completion" if "completion" in row or "answer" not in row else "answer"
    prompt, answer = as_text(require(row, prompt_name), prompt_name), as_text(require(row, answer_name), answer_name)
    if isinstance(answer, tuple):
        _one_answer(answer)
        prompt = user_turn(prompt) if isinstance(prompt, str) else prompt
    elif isinstance(prompt, tuple):
        answer = assistant_turn(answer)
    return prompt, answer


def _meta(row: dict) -> dict[str, Any]:
    given = row.get("meta") or {}
    if not isinstance(given, dict):
        raise RecordError("wrong_type", f"field 'meta' is {type(given).__name__}, not an object", malformed=True)
    return {**given, **{name: row[name] for name in META_COLUMNS if row.get(name) is not None}}


CONVERTERS: dict[str, Callable[[dict], Record]] = {
    "preference": _preference,
    "implicit": _implicit,
    "hh": _hh,
    "unpaired": _unpaired,
    "answer": _answer,
}
