"""Multiple-choice questions: rows of the field's data sets → one question, its choices, and which of them is right.

| rows                                                                             | as in               |
|----------------------------------------------------------------------------------|---------------------|
| question, choices (a list), answer (a number from 0, a letter, or the text)      | MMLU                |
| question, choices {"text": [...], "label": [...]}, answerKey                     | ARC, CommonsenseQA  |
| ctx or query, endings, label                                                     | HellaSwag           |
| prompt, chosen, rejected: two choices, the first one right                       | preference pairs    |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.records import (
    PreferenceRecord,
    Record,
    RecordError,
    Text,
    as_text,
    missing_field,
    stable_hash,
    text_key,
)
from data_pipeline.sources.formats import convert

QUESTIONS = ("question", "prompt", "query", "ctx", "input")
CHOICES = ("choices", "options", "endings")
RIGHT = ("answerKey", "answer", "label", "gold", "target")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class ChoiceRecord:
    """``choices[right]`` answers ``prompt``; the others do not."""

    id: str
    prompt: Text
    choices: tuple[Text, ...]
    right: int
    meta: dict = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex digits of what is asked."""
        return f"{stable_hash(*map(text_key, (self.prompt, *self.choices)), str(self.right)):016x}"


def choice_records(row: dict[str, Any]) -> Iterator[ChoiceRecord]:
    """The questions of a row: one, or one for each pair that it holds. RecordError for a row that has none."""
    listed = next((name for name in CHOICES if row.get(name) is not None), None)
    if listed is None:
        for record in convert(row):
            question = question_of(record)
            if question is None:
                raise RecordError("no_choices", f"no choices in it: give one of {', '.join(CHOICES)}", malformed=True)
            yield question
        return
    asked = next((name for name in QUESTIONS if row.get(name)), None)
    answered = next((name for name in RIGHT if row.get(name) is not None), None)
    if asked is None or answered is None:
        raise missing_field(QUESTIONS[0] if asked is None else RIGHT[1], row)
    texts, labels = _texts_and_labels(row[listed], listed)
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    made = ChoiceRecord("", as_text(row[asked], asked), texts, _place(row[answered], texts, labels, answered), meta)
    yield ChoiceRecord(str(row.get("id") or made.digest), made.prompt, texts, made.right, meta)


def question_of(record: Record) -> ChoiceRecord | None:
    """A pair as a question with two choices; None for a single answer."""
    if not isinstance(record, PreferenceRecord):
        return None
    return ChoiceRecord(record.id, record.prompt, (record.chosen, record.rejected), 0, record.meta)


def _texts_and_labels(value: Any, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels: Any = ()
    if isinstance(value, Mapping):
        labels, value = value.get("label", ()), value.get("text")
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each.strip() for each in value):
        raise RecordError("wrong_type", f"field {name!r} is no list of texts, none of them empty", malformed=True)
    if len(value) < 2 or len(set(value)) < len(value):
        raise RecordError("few_choices", f"field {name!r} must hold two choices or more, no two alike")
    return tuple(value), tuple(map(str, labels))


def _place(right: Any, texts: tuple[str, ...], labels: tuple[str, ...], name: str) -> int:
    """The number of the right choice, from a number from 0, a letter, a label, or the text itself."""
    word = str(right).strip()
    for known in (labels, texts, tuple(map(str, range(len(texts)))), tuple(LETTERS[: len(texts)])):
        if word in known and not isinstance(right, bool):
            return known.index(word)
    raise RecordError(
        "no_right_choice", f"field {name!r} is {right!r}: no number from 0, letter, label or text of the choices"
    )
