"""A question with several answers, each right or wrong → right-against-wrong pairs.

Layouts of a row (the question is ``question`` or ``prompt``):
- lists: ``candidates`` (or answers, responses, completions, solutions) beside ``correct`` (or is_correct, labels);
- objects: ``candidates`` a list of ``{"text" | "solution" | "answer": str, "is_correct" | "correct": bool}``;
- grade-school-math: one column per model, each ``{"solution": str, "is_correct": bool}``;
- long: one row per answer, ``{question, answer | solution | completion, is_correct | correct}`` (``add_long_row``).
A human solution in ``ground_truth`` (or ``reference``) counts as one more right answer, if asked for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.records import (
    GRADES,
    PreferenceRecord,
    RecordError,
    Text,
    as_label,
    assistant_turn,
    missing_field,
    require,
    text_key,
    with_id,
)
from data_pipeline.sources.columns import (
    FLAGS,
    LISTS,
    REFERENCES,
    TEXTS,
    Fields,
    is_graded,
    read_prompt,
    read_template_kwargs,
    with_turns_before,
)

POLICIES = ("matched", "all", "one")


@dataclass(frozen=True)
class Pairing:
    """How right and wrong answers are paired.

    ``all``: every right with every wrong answer. ``matched``: each answer at most once, closest lengths first, so that
    length tells little about which is right. ``one``: the one pair closest in length.
    ``max_pairs`` limits the pairs of one question (0: no limit). ``use_reference``: the human solution is paired too.
    """

    policy: str = "matched"
    max_pairs: int = 0
    use_reference: bool = False

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise DataError(f"pairing is {self.policy!r}; allowed: {', '.join(POLICIES)}")
        if self.max_pairs < 0:
            raise DataError(f"max_pairs is {self.max_pairs}; it must be at least 0 (0: no limit)")


@dataclass(frozen=True)
class Candidate:
    """One answer, whether it is right, and who gave it."""

    text: str
    correct: bool
    author: str = ""


def _first(row: dict, names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _model_columns(row: dict) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, dict) and is_graded(value)]


def has_candidates(row: dict) -> bool:
    """True for the layouts of the module's docstring, the long one excepted."""
    name = _first(row, LISTS)
    listed = name is not None and isinstance(row[name], list)
    objects = listed and bool(row[name]) and isinstance(row[name][0], dict) and _first(row[name][0], FLAGS) is not None
    return bool(_model_columns(row)) or objects or (listed and _first(row, FLAGS) is not None)


def is_long(row: dict) -> bool:
    """True for the long layout: one answer and whether it is right. (A row with a label of its own is a KTO row.)"""
    other = has_candidates(row) or not {"chosen", "rejected", "label", "kto_tag"}.isdisjoint(row)
    return not other and _first(row, GRADES) is not None and _first(row, TEXTS) is not None


def _candidates(row: dict) -> list[Candidate]:
    name = _first(row, LISTS)
    if name is None or not isinstance(row[name], list):
        found = [_from_object({"model": column, **row[column]}) for column in _model_columns(row)]
        if not found:
            raise missing_field("candidates", row)
        return found
    if row[name] and isinstance(row[name][0], dict):
        return [_from_object(item) for item in row[name]]
    if any(not isinstance(text, str) for text in row[name]):
        raise RecordError("wrong_type", f"{name!r} holds something that is not text", malformed=True)
    flags = row[_first(row, FLAGS) or "correct"] if _first(row, FLAGS) else require(row, "correct")
    if not isinstance(flags, list) or len(flags) != len(row[name]):
        raise RecordError("wrong_type", f"{name!r} and its correctness are not lists of one length", malformed=True)
    return [Candidate(str(text), as_label(flag)) for text, flag in zip(row[name], flags, strict=True)]


def _from_object(item: Any) -> Candidate:
    if not isinstance(item, dict):
        raise RecordError("wrong_type", "a candidate is not an object like the first one", malformed=True)
    text, flag = _first(item, TEXTS), _first(item, FLAGS)
    if text is None or flag is None:
        raise missing_field("text" if text is None else "is_correct", item)
    if not isinstance(item[text], str):
        raise RecordError("wrong_type", f"field {text!r} is {type(item[text]).__name__}, not a string", malformed=True)
    return Candidate(item[text], as_label(item[flag]), str(item.get("model", "")))


def make_pairs(candidates: list[Candidate], pairing: Pairing) -> list[tuple[Candidate, Candidate]]:
    """(right, wrong) pairs under the policy, in an order set by the candidates alone. Equal texts count once."""
    unique = list({(c.text.strip(), c.correct): c for c in reversed(candidates) if c.text.strip()}.values())[::-1]
    right, wrong = ([c for c in unique if c.correct is side] for side in (True, False))
    pairs = [(a, b) for a, b in product(right, wrong) if a.text.strip() != b.text.strip()]
    if pairing.policy != "all":
        pairs.sort(key=lambda pair: abs(len(pair[0].text) - len(pair[1].text)))  # stable: ties keep the order given
        pairs = _each_once(pairs)[: 1 if pairing.policy == "one" else None]
    return pairs[: pairing.max_pairs or None]


def _each_once(pairs: list[tuple[Candidate, Candidate]]) -> list[tuple[Candidate, Candidate]]:
    used: set[int] = set()
    kept = []
    for pair in pairs:
        if not used & {id(side) for side in pair}:
            used |= {id(side) for side in pair}
            kept.append(pair)
    return kept


def candidate_records(
    row: dict, pairing: Pairing, question: Text, template_kwargs: dict[str, Any]
) -> Iterator[PreferenceRecord]:
    """The pairs of one question. Raises RecordError, kind ``no_contrast``, when all answers are right or all wrong."""
    candidates = _candidates(row)
    reference = _first(row, REFERENCES)
    if pairing.use_reference and reference:
        candidates = [*candidates, Candidate(str(row[reference]), True, reference)]
    pairs = make_pairs(candidates, pairing)
    if not pairs:
        raise RecordError("no_contrast", "no right answer stands against a wrong one")
    meta = {name: row[name] for name in ("source", *REFERENCES) if row.get(name)}
    for right, wrong in pairs:
        authors = {"chosen_by": right.author, "rejected_by": wrong.author} if right.author else {}
        answers: tuple[Text, Text] = (right.text, wrong.text)
        if isinstance(question, tuple):
            answers = (assistant_turn(right.text), assistant_turn(wrong.text))
        record = PreferenceRecord("", question, *answers, meta | authors, template_kwargs)
        yield with_id(record, None)  # type: ignore[misc]


def add_long_row(groups: dict[str, dict], row: dict) -> None:
    """Gather a row of the long layout under its question: ``groups`` becomes one row per question, in order of first
    appearance. Raises RecordError, and leaves ``groups`` as it is, for a row of another layout."""
    fields = row if isinstance(row, Fields) else Fields(row)
    item = {name: fields[name] for name in (*TEXTS, *FLAGS, "model") if fields.get(name) is not None}
    _from_object(item)
    fields.read.update(TEXTS)
    prompt = read_prompt(fields)
    if prompt is None:
        raise missing_field("question", fields)
    question = with_turns_before(prompt, fields)
    given = read_template_kwargs(fields)
    key = text_key(question) + (repr(sorted(given.items())) if given else "")
    new: dict[str, Any] = {"question": question, "candidates": []} | ({"template_kwargs": given} if given else {})
    group = groups.setdefault(key, new)
    group["candidates"].append(item)
    group |= {name: fields[name] for name in (*REFERENCES, "source") if fields.get(name) is not None}
