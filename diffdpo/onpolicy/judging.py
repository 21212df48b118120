"""Who judges sampled answers: a verifier, or scores that somebody else has given them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.verifiers import Judge, find_verifier
from diffdpo.errors import UserError
from diffdpo.onpolicy.questions import Question

SCORES, NOBODY = "scores:", "none"


class Scores:
    """Scores by answer, from JSON lines {"id", "score"} with the ids of ``answers.jsonl``: a reward model's."""

    def __init__(self, path: Path):
        self.path, self.by_id = path, _read(path)

    def __call__(self, question: Question, answers: Sequence[dict[str, Any]]) -> list[float]:
        return [self.by_id[answer["id"]] for answer in answers]

    def match(self, answers: Sequence[dict[str, Any]]) -> int:
        """How many scores are of no answer. UserError where an answer has none."""
        ids = {answer["id"] for answer in answers}
        if missing := [answer["id"] for answer in answers if answer["id"] not in self.by_id]:
            raise UserError(
                f"--verifier scores:{self.path} has no score of {len(missing)} of {len(ids)} answers, first "
                f"{missing[0]!r}; add them"
            )
        return len(self.by_id.keys() - ids)


class Verified:
    """A verifier's judgement; None for a question of which it does not know what is right."""

    def __init__(self, verifier: Judge):
        self.verifier = verifier

    def check(self, questions: Sequence[Question]) -> None:
        """UserError where nothing could be judged, before anything is sampled."""
        if all(question.truth(self.verifier) is None for question in questions):
            raise UserError(
                f"no right result is known for any of the {len(questions)} prompts: give each an answer that the "
                "verifier can read, or name a verifier of your own (module:function) or scores (scores:FILE)"
            )

    def __call__(self, question: Question, answers: Sequence[dict[str, Any]]) -> list[float] | None:
        """DataError, which names the answer, where a user's function fails."""
        truth = question.truth(self.verifier)
        if truth is None:
            return None
        try:
            return [self.verifier.judge(answer["answer"], truth, question.prompt) for answer in answers]
        except DataError as error:
            raise DataError(f"prompt {question.key!r}: {error}") from error


def judge_named(name: str) -> Scores | Verified:
    """By ``--verifier``. UserError or DataError for one that cannot be had."""
    if name.startswith(SCORES):
        return Scores(Path(name.removeprefix(SCORES)))
    return Verified(find_verifier(name))


def _read(path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verifier scores:{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                key, given = str(row["id"]), row["score"]
                if isinstance(given, str | bool):
                    raise TypeError("no number")
                score = float(given)
            except (ValueError, KeyError, TypeError, OverflowError):
                raise UserError(
                    f'--verifier scores:{path} line {number}: no JSON object with "id" and a number as "score"'
                ) from None
            if not math.isfinite(score):
                raise UserError(f"--verifier scores:{path} line {number}: the score is {score}, no finite number")
            if found.setdefault(key, score) != score:
                raise UserError(
                    f"--verifier scores:{path} line {number}: {key!r} has the score {score:g} and, further up, "
                    f"{found[key]:g}; keep one"
                )
    return found
