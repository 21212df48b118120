"""What is asked: prompts from a file or data set, each with the result that is right where one is known."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.generate import generate_pairs
from data_pipeline.records import (
    AnswerRecord,
    PreferenceRecord,
    Record,
    RecordError,
    Text,
    as_object,
    as_text,
    is_empty,
    text_key,
)
from data_pipeline.sources.columns import ANSWERS, PAIR, TURNS
from data_pipeline.sources.files import SourceOptions, open_rows
from data_pipeline.sources.formats import convert
from data_pipeline.verifiers import Judge
from diffdpo.errors import UserError

MOST_IN_VAIN = 2000  # generated problems in a row that were all met before


@dataclass(frozen=True)
class Question:
    """``stated``: the result that is right, as it stands beside the prompt; ``answer``: a right answer, '' where none
    is known."""

    key: str
    prompt: Any
    stated: Any = None
    answer: str = ""

    def truth(self, verifier: Judge) -> str | None:
        """The right result, as the verifier reads it from what is stated or from the right answer."""
        found = verifier.truth(self.stated, self.answer)
        return verifier.truth(self.answer, self.answer) if found is None and self.answer else found


@dataclass(frozen=True)
class Asked:
    """The distinct questions of a source; how many were met again, and how many rows hold none that can be used."""

    questions: list[Question]
    repeated: int = 0
    unusable: int = 0
    contradicted: int = 0  # of those met again, with another right result; the first holds

    @property
    def digest(self) -> str:
        """16 hex digits of the questions and their order."""
        texts = json.dumps([(q.key, text_key(q.prompt)) for q in self.questions], ensure_ascii=False)
        return hashlib.blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def read_questions(source: str, *, limit: int = 0) -> Asked:
    """The questions of a text file with a prompt a line, of rows with a ``prompt`` and perhaps an ``answer``, or of
    whatever training data may be: the right answer is then the chosen one. ``limit``: the first so many; 0: all.
    DataError or UserError where there are none, and for a row that holds no prompt."""
    found: dict[str, Question] = {}
    keys, repeated, unusable, contradicted = set[str](), 0, 0, 0
    for number, question in enumerate(_questions(source), start=1):
        if question is None:
            unusable += 1
            continue
        text = text_key(question.prompt)
        if text in found:
            repeated += 1
            if found[text].stated is None and not found[text].answer:
                found[text] = replace(found[text], stated=question.stated, answer=question.answer)
            elif None not in (found[text].stated, question.stated):
                contradicted += str(found[text].stated) != str(question.stated)
            continue
        if limit and len(found) == limit:
            break
        key = question.key or str(number)
        while key in keys:
            key = f"{key}#{number}"
        keys.add(key)
        found[text] = Question(key, question.prompt, question.stated, question.answer)
    if not found:
        left_out = f" ({unusable} rows cannot be used)" if unusable else ""
        raise UserError(f"--prompts {source}: no prompt in it{left_out}; give a file with at least one")
    return Asked(list(found.values()), repeated, unusable, contradicted)


def generated_questions(count: int, *, seed: int) -> Asked:
    """``count`` distinct problems in arithmetic of the training side, each with its result. UserError where there are
    not so many."""
    found: dict[str, Question] = {}
    vain = 0
    for record in generate_pairs(sys.maxsize, seed=seed):
        if len(found) == count:
            break
        vain = vain + 1 if record["prompt"] in found else 0
        if vain > MOST_IN_VAIN:
            raise UserError(f"there are about {len(found)} distinct generated problems, and {count} are asked for")
        question = Question(record["id"], record["prompt"], record["meta"]["answer"], record["chosen"])
        found.setdefault(record["prompt"], question)
    return Asked(list(found.values()))


def _questions(source: str) -> Iterator[Question | None]:
    """None for a row of which nothing can be asked, an empty prompt for one. DataError for a malformed one."""
    path = Path(source)
    if path.suffix == ".txt":
        yield from _lines(path)
        return
    for row in open_rows(source, SourceOptions()):
        try:
            yield from _of_row(row.parsed())
        except RecordError as error:
            if error.malformed:
                raise DataError(f"--prompts {row.where}: {error}") from None
            yield None


def _lines(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Question(str(number), line)


def _of_row(row: dict) -> Iterator[Question]:
    """The questions of the records a row makes; of a row with a prompt and no answer text, that prompt."""
    if "prompt" in row and not isinstance(row.get("answer"), str | list | dict) and not _has_answers(row):
        stated = row.get("answer", as_object(row, "meta").get("answer"))
        yield Question(str(row.get("id") or ""), _not_empty(as_text(row["prompt"], "prompt")), stated)
        return
    for record in convert(row):
        yield Question(record.id, record.prompt, record.meta.get("answer"), right_answer(record))


def _not_empty(prompt: Text) -> Text:
    if is_empty(prompt):
        raise RecordError("empty_prompt", "the prompt is empty")
    return prompt


def _has_answers(row: dict) -> bool:
    names = {*PAIR, *ANSWERS, *TURNS, "label"} - {"answer"}
    return any(row.get(name) is not None for name in names)


def right_answer(record: Record) -> str:
    """The text of a record's right answer; '' where it has none."""
    if isinstance(record, AnswerRecord):
        text = record.answer if record.label else ""
    else:
        assert isinstance(record, PreferenceRecord)
        text = record.chosen
    return text if isinstance(text, str) else str(text[-1]["content"])
