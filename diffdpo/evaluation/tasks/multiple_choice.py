"""Multiple choice by score: of the choices of a question, does the right one get the highest?"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_pipeline.encode import Drop, Encoder, TokenAnswer, answer_text
from data_pipeline.records import AnswerRecord
from data_pipeline.sources.choices import ChoiceRecord
from diffdpo.evaluation.estimate import mean_figure
from diffdpo.evaluation.score_answers import NamedAnswer, score_answers
from diffdpo.evaluation.tasks.base import Key, Line, Subject
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.segments import Segments


class MultipleChoice:
    """Every choice is scored as a whole answer, with the terminator that training puts after it. The choices of a
    question share their noise (``score_answers``)."""

    name = "multiple_choice"

    def __init__(
        self,
        questions: Iterable[ChoiceRecord],
        encoder: Encoder,
        noise: NoiseOptions,
        *,
        segments: Segments,
        name: str = name,
    ):
        self.name, self.noise, self.segments = name, noise, segments
        self.left_out: list[str] = []
        self.questions: list[ChoiceRecord] = []
        self.tokens: list[list[TokenAnswer]] = []
        for question in questions:
            encoded = [_encoded(question, choice, encoder) for choice in question.choices]
            dropped = [each for each in encoded if isinstance(each, Drop)]
            if dropped:
                self.left_out.append(f"{question.id}: {dropped[0].reason} {dropped[0].detail}".rstrip())
            else:
                self.questions.append(question)
                self.tokens.append([each for each in encoded if isinstance(each, TokenAnswer)])
        self.keys = [Key(question.id, question.digest) for question in self.questions]

    def identity(self) -> dict[str, Any]:
        noise = self.noise
        return {
            "task": self.name,
            "score_estimator": noise.estimator,
            "num_mc_samples": noise.num_samples,
            "num_diffusion_steps": noise.num_diffusion_steps,
            "seed": noise.seed,
        }

    def lines(self, subject: Subject, numbers: Sequence[int]) -> list[Line]:
        answers = [
            NamedAnswer(self.keys[number].id, each.ids.tolist(), each.prompt_length)
            for number in numbers
            for each in self.tokens[number]
        ]
        found = score_answers(subject.policy, answers, self.noise, device=subject.device, segments=self.segments)
        scores = iter(found)
        lines = []
        for number in numbers:
            question, own = self.questions[number], [next(scores) for _ in self.tokens[number]]
            lines.append(
                {
                    "id": question.id,
                    "right": question.right,
                    "scores": [each.score for each in own],
                    "stderr": [each.stderr for each in own],
                    "tokens": [len(each.ids) - each.prompt_length for each in self.tokens[number]],
                    "bytes": [len(answer_text(choice, spaced=False).encode()) for choice in question.choices],
                }
            )
        return lines

    def figures(self, lines: Sequence[Line]) -> dict[str, Any]:
        choices = [len(line["scores"]) for line in lines]
        return {
            "accuracy": mean_figure([self._value(line, per=None) for line in lines]),
            "accuracy_per_token": mean_figure([self._value(line, per="tokens") for line in lines]),
            "accuracy_per_byte": mean_figure([self._value(line, per="bytes") for line in lines]),
            "chance": {"mean": float(np.mean([1 / count for count in choices])), "count": len(lines)},
        }

    def values(self, lines: Sequence[Line]) -> dict[str, float]:
        return {line["id"]: self._value(line, per=None) for line in lines}

    @staticmethod
    def _value(line: Line, *, per: str | None) -> float:
        """1 where the right choice is above all others; of k that share the highest score, 1/k if it is among them."""
        scores = np.array(line["scores"], dtype=np.float64)
        if per is not None:
            scores = scores / np.maximum(1, np.array(line[per]))
        best = scores == scores.max()
        return float(best[line["right"]]) / int(best.sum())


def _encoded(question: ChoiceRecord, choice: Any, encoder: Encoder) -> TokenAnswer | Drop:
    pair = encoder(AnswerRecord(question.id, question.prompt, choice))
    if isinstance(pair, Drop):
        return pair
    assert pair.chosen is not None  # a desirable answer
    return pair.chosen
