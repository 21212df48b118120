"""Problems: prompts whose right answer is known, made from records and not from tokens decoded again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from data_pipeline.encode import Drop, Encoder, answer_text
from data_pipeline.records import AnswerRecord, PreferenceRecord, Record, Text
from data_pipeline.verifiers import Judge


@dataclass(frozen=True)
class Problem:
    """``ids``: the prompt's tokens, as training has them; ``answer_tokens``: of the record's right answer, with its
    terminator; ``truth``: what the verifier compares with."""

    id: str
    prompt: Text
    ids: tuple[int, ...]
    truth: str
    answer_tokens: int

    @property
    def digest(self) -> str:
        """16 hex digits of what is asked and what is right."""
        return blake2b(repr((self.ids, self.truth)).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def problems_of(
    records: Iterable[Record], encoder: Encoder, verifier: Judge, left_out: list[str]
) -> list[tuple[int, Problem]]:
    """(number of the record, problem) for each record with a right answer that gives a result.

    What is right: stated in the record's meta as ``answer``, or read by the verifier from the chosen answer. Why a
    record gives none is appended to ``left_out``.
    """
    found = []
    for number, record in enumerate(records):
        answer = right_answer(record)
        truth = None if answer is None else verifier.truth(record.meta.get("answer"), answer)
        if answer is None or truth is None:
            left_out.append(f"{record.id}: {'its answer is a wrong one' if answer is None else 'no result in it'}")
            continue
        pair = encoder(AnswerRecord(record.id, record.prompt, answer, template_kwargs=record.template_kwargs))
        if isinstance(pair, Drop):
            left_out.append(f"{record.id}: {pair.reason} {pair.detail}".rstrip())
            continue
        assert pair.chosen is not None  # a desirable answer
        ids, start = pair.chosen.ids.tolist(), pair.chosen.prompt_length
        found.append((number, Problem(record.id, record.prompt, tuple(ids[:start]), truth, len(ids) - start)))
    return found


def right_answer(record: Record) -> str | None:
    """The text of a record's right answer; None where its only answer is undesirable."""
    if isinstance(record, PreferenceRecord):
        return answer_text(record.chosen, spaced=False)
    return answer_text(record.answer, spaced=False) if record.label else None


def distinct(problems: Sequence[Problem]) -> list[Problem]:
    """One problem a prompt, and one an id: the first of each."""
    found: dict[tuple[int, ...], Problem] = {}
    met = set[str]()
    for problem in problems:
        if problem.id not in met:
            found.setdefault(problem.ids, problem)
        met.add(problem.id)
    return list(found.values())
