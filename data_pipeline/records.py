"""The two records of the corpus: a preference pair and a single labelled answer. Text only; tokens come later.

A record is stored as one JSON object. Text is kept as it is (strings, or chat messages): the chat template belongs
to the model and is applied when the record is read for training.
"""

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict, cast

from data_pipeline.errors import DataError


class Message(TypedDict, total=False):
    """One turn of a conversation. ``role`` is system, user, assistant or tool; role and content are always there.

    The rest is there where the turn has it: what was thought before the content, and calls of tools as the chat
    templates of transformers read them.
    """

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    reasoning: str
    thinking: str
    tool_calls: list
    function_call: dict
    tool_call_id: str
    name: str


Text = str | tuple[Message, ...]
WRITTEN_ASIDE = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""What a turn says beside its content: a template that leaves it out shows the model another conversation."""
KEPT_OF_A_TURN = (*WRITTEN_ASIDE, "tool_call_id", "name")
GRADES = ("is_correct", "correct")  # fields that say whether an answer is right
LABELS = ("label", "kto_tag", *GRADES)
TRUE = ("true", "yes", "1", "1.0", "good", "desirable")  # as tables spell a label; any case
FALSE = ("false", "no", "0", "0.0", "bad", "undesirable")


@dataclass(frozen=True)
class PreferenceRecord:
    """``chosen`` is preferred to ``rejected`` as an answer to ``prompt``. ``template_kwargs``: what the chat template
    is given besides the turns, such as ``tools``. ``meta``: what is kept for people and tasks, and never learned."""

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    meta: dict = field(default_factory=dict)
    template_kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerRecord:
    """A single answer, desirable (``label``) or not: unpaired preference data (KTO), or SFT data (all desirable)."""

    id: str
    prompt: Text
    answer: Text
    label: bool = True
    meta: dict = field(default_factory=dict)
    template_kwargs: dict = field(default_factory=dict)


Record = PreferenceRecord | AnswerRecord


class RecordError(DataError):
    """A record that cannot be used. ``kind`` is a short name, the same for all records with the fault, for counting.

    ``malformed`` tells a broken file (invalid JSON, missing fields, wrong types) from poor data (empty or equal
    answers): the first stops a build unless asked otherwise, the second is dropped and counted.
    """

    def __init__(self, kind: str, message: str, *, malformed: bool = False):
        super().__init__(message)
        self.kind = kind
        self.malformed = malformed

    def __reduce__(self):
        """Errors are pickled by their arguments, and this one's are not those of its class."""
        return _record_error, (self.kind, str(self), self.malformed)


def _record_error(kind: str, message: str, malformed: bool) -> RecordError:
    return RecordError(kind, message, malformed=malformed)


def missing_field(name: str, row: dict) -> RecordError:
    """The error for an absent field, naming what is there."""
    there = ", ".join(repr(key) for key in row) or "none"
    return RecordError("missing_field", f"missing field {name!r} (fields found: {there})", malformed=True)


def require(row: dict, name: str) -> Any:
    """``row[name]``, or the error that names the missing field. An explicit null counts as missing."""
    if row.get(name) is None:
        raise missing_field(name, row)
    return row[name]


def as_text(value: Any, name: str) -> Text:
    """A string, or a tuple of messages, from parsed JSON; raises on any other type."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_as_message(item, name) for item in value)
    found = type(value).__name__
    raise RecordError("wrong_type", f"field {name!r} is {found}, not a string or a list of messages", malformed=True)


def _as_message(item: Any, name: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str):
        raise RecordError(
            "wrong_type", f"field {name!r} has a message that is not {{'role': str, 'content': str}}", malformed=True
        )
    kept = {name: item[name] for name in KEPT_OF_A_TURN if item.get(name)}
    return cast(Message, {"role": item["role"], "content": item["content"], **kept})


def assistant_turn(text: str) -> tuple[Message, ...]:
    """An answer's text as a conversation of one turn."""
    return ({"role": "assistant", "content": text},)


def user_turn(text: str) -> tuple[Message, ...]:
    """A question's text as a conversation of one turn."""
    return ({"role": "user", "content": text},)


def text_key(text: Text) -> str:
    """A canonical string of a text: equal for equal texts only."""
    return json.dumps(text, ensure_ascii=False, sort_keys=True)


def is_empty(text: Text) -> bool:
    """True when nothing would be seen, only blanks and signs without a shape (of messages: when the last one is so and
    calls no tool)."""
    if isinstance(text, str):
        return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)
    return not text or not (
        not is_empty(text[-1]["content"]) or text[-1].get("tool_calls") or text[-1].get("function_call")
    )


def aside_of(message: Message) -> dict[str, Any]:
    """What a turn says beside its content."""
    return {name: value for name in WRITTEN_ASIDE if (value := message.get(name))}


def text_bytes(text: Text) -> int:
    """Length in UTF-8 bytes (of messages: of what they say): the cheap stand-in for a number of tokens."""
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    if not isinstance(text, str):
        parts += [json.dumps(aside, ensure_ascii=False) for message in text if (aside := aside_of(message))]
    return sum(len(part.encode("utf-8", "surrogatepass")) for part in parts)


def stable_hash(*parts: str) -> int:
    """64 bits of blake2b over the parts: the same on every machine and in every run."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def answers_of(record: Record) -> tuple[Text, ...]:
    """(chosen, rejected) of a pair; the one answer of an unpaired record."""
    return (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else (record.answer,)


def content_hash(record: Record) -> int:
    """Hash of what is learned from: prompt, answers, label and what the template is given; neither id nor meta."""
    sides = [text_key(text) for text in (record.prompt, *answers_of(record))]
    given = [json.dumps(record.template_kwargs, sort_keys=True, default=str)] if record.template_kwargs else []
    return stable_hash(*sides, "" if isinstance(record, PreferenceRecord) else str(record.label), *given)


def prompt_hash(record: Record) -> int:
    """Hash of the prompt: records of one prompt stay on one side of a train/eval split.

    A question has the same hash as text and as a user's turn, and with or without white space around it.
    """
    turns = user_turn(record.prompt) if isinstance(record.prompt, str) else record.prompt
    return stable_hash(*(part.strip() for turn in turns for part in (turn["role"], turn["content"])))


def check(record: Record) -> Record:
    """The record itself, or RecordError when nothing can be learned from it."""
    try:
        for text in (record.id, record.prompt, *answers_of(record), record.template_kwargs):
            everything = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
            everything.encode()
    except UnicodeEncodeError as error:
        raise RecordError("invalid_unicode", f"the text holds half of a surrogate pair: {error}") from error
    if is_empty(record.prompt):
        raise RecordError("empty_prompt", "the prompt is empty")
    sides = ("chosen", "rejected") if isinstance(record, PreferenceRecord) else ("answer",)
    for name in sides:
        if is_empty(getattr(record, name)):
            raise RecordError(f"empty_{name}", f"{name} is empty")
    if isinstance(record, PreferenceRecord) and _plain(record.chosen) == _plain(record.rejected):
        raise RecordError("chosen_equals_rejected", "chosen equals rejected")
    return record


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text.strip()
    return text_key(tuple(cast(Message, {**turn, "content": turn["content"].strip()}) for turn in text))


def encode_record(record: Record) -> bytes:
    """The stored form: one JSON object in UTF-8, the same bytes for the same record."""
    fields: dict[str, Any] = {"id": record.id, "prompt": record.prompt}
    if isinstance(record, PreferenceRecord):
        fields |= {"chosen": record.chosen, "rejected": record.rejected}
    else:
        fields |= {"answer": record.answer, "label": record.label}
    if record.template_kwargs:
        fields["template_kwargs"] = record.template_kwargs
    data = json.dumps(fields | {"meta": record.meta}, ensure_ascii=False, separators=(",", ":"), default=str)
    return data.encode("utf-8", "surrogatepass")


def parse_json(raw: bytes | str) -> dict:
    """A JSON object, or RecordError (kinds ``invalid_json``, ``wrong_type``, ``repeated_key``)."""
    try:
        text = str(raw, "utf-8-sig", "surrogatepass") if isinstance(raw, bytes) else raw  # json would guess at UTF-16
        row = json.loads(text, object_pairs_hook=without_repetition)
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RecordError("invalid_json", f"invalid JSON: {error}", malformed=True) from error
    if not isinstance(row, dict):
        hint = "; a list of rows is a .json file" if isinstance(row, list) else ""
        raise RecordError("wrong_type", f"a JSON object is needed, found {type(row).__name__}{hint}", malformed=True)
    return row


def without_repetition(pairs: list[tuple[str, Any]]) -> dict:
    """The object of a JSON text, as a hook of ``json.loads``. RecordError for one that says a name twice, of which
    Python would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RecordError("repeated_key", f"the name {twice!r} stands twice in one object", malformed=True)
    return found


def decode_record(raw: bytes) -> Record:
    """The record stored as ``raw`` by ``encode_record``. Raises RecordError for anything that is not one.

    Rows of other makers are read by ``sources.formats``, which knows their layouts.
    """
    return record_from_fields(parse_json(raw))


def record_from_fields(row: dict) -> Record:
    """A record from explicit fields {prompt, chosen, rejected} or {prompt, answer | completion [, label]}."""
    prompt = as_text(require(row, "prompt"), "prompt")
    meta, given = (as_object(row, name) for name in ("meta", "template_kwargs"))
    if "chosen" in row or "rejected" in row:
        chosen, rejected = (as_text(require(row, name), name) for name in ("chosen", "rejected"))
        return with_id(PreferenceRecord("", prompt, chosen, rejected, meta, given), row.get("id"))
    name = "answer" if "answer" in row else "completion"
    if name not in row:
        raise missing_field("chosen", row)
    text = as_text(require(row, name), name)
    label = as_label(row["label"]) if "label" in row else answer_label(row, GRADES) is not False
    return with_id(AnswerRecord("", prompt, text, label, meta, given), row.get("id"))


def as_object(row: dict, name: str) -> dict:
    """An object of a row; an absent one is empty. Raises RecordError for anything else."""
    value = row.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecordError("wrong_type", f"field {name!r} is {type(value).__name__}, not an object", malformed=True)
    return value


def answer_label(row: dict, names: tuple[str, ...]) -> bool | None:
    """Whether the single answer of a row is good, by the first of the named fields that is there; None without any."""
    name = next((name for name in names if row.get(name) is not None), None)
    return None if name is None else as_label(row[name], name)


def as_label(value: Any, name: str = "label") -> bool:
    """True or False from a boolean, 0/1 or their usual spellings; RecordError otherwise."""
    if isinstance(value, str) and (spelled := value.strip().lower()) in (*TRUE, *FALSE):
        return spelled in TRUE
    if value in (0, 1):  # bool is an int; numpy booleans compare equal too
        return bool(value)
    allowed = ", ".join(TRUE + FALSE)
    raise RecordError("wrong_type", f"{name} {value!r} is not true or false; allowed: {allowed}", malformed=True)


def with_id(record: Record, given: Any) -> Record:
    """The checked record under its given id, or under a hash of its content when it has none."""
    if given is not None and not isinstance(given, str | int):
        raise RecordError("wrong_type", f"field 'id' is {type(given).__name__}, not a string", malformed=True)
    name = str(given) if given not in (None, "") else f"{content_hash(record):016x}"
    return check(type(record)(**{**vars(record), "id": name}))
