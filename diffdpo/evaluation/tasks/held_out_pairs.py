"""Held-out pairs: does the model prefer what it should, by how much, and how sure may one be of it?

With a reference the logit of a pair is h = beta ((S - S_ref)(chosen) - (S - S_ref)(rejected)), as in training; without
one it is S(chosen) - S(rejected), the model's own odds of the two answers.

Shape suffixes: P pairs, 2 sides (0 chosen, 1 rejected).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.encode import Drop, Encoder, TokenPair
from data_pipeline.records import Record
from diffdpo.evaluation.calibration import calibration_curve, expected_calibration_error
from diffdpo.evaluation.estimate import figure, mean_figure
from diffdpo.evaluation.perplexity import perplexity_bound
from diffdpo.evaluation.preferences import separation
from diffdpo.evaluation.score_file import digest
from diffdpo.evaluation.score_pairs import as_line, check_finite, encoded, score_pairs
from diffdpo.evaluation.tasks.base import Key, Line, Subject
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.rounding import preferred, size_of
from diffdpo.scores.segments import Segments

LENGTH_GROUPS = 4
SIDES = ("chosen", "rejected")


class HeldOutPairsTask:
    """A line is that of ``launch/score.py``, and where the record came from (``meta["source"]``)."""

    def __init__(
        self,
        records: Iterable[Record],
        encoder: Encoder,
        noise: NoiseOptions,
        *,
        beta: float,
        segments: Segments,
        name: str = "pairs",
    ):
        self.name, self.noise, self.beta, self.segments = name, noise, beta, segments
        self.pairs: list[TokenPair] = []
        dropped: list[tuple[str, Drop]] = []
        kept = {}
        for record in records:
            for pair in encoded([record], encoder, dropped, noise):
                self.pairs.append(pair)
                kept[len(self.pairs) - 1] = digest(record)
        self.left_out = [f"{key}: {drop.reason} {drop.detail}".rstrip() for key, drop in dropped]
        self.keys = [Key(pair.id, kept[number]) for number, pair in enumerate(self.pairs)]

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
        pairs = [self.pairs[number] for number in numbers]
        models = [subject.policy] if subject.reference is None else [subject.policy, subject.reference]
        scores, ratio = score_pairs(pairs, models, self.noise, device=subject.device, segments=self.segments)
        check_finite(pairs, scores)
        lines = [as_line(pair, index, scores, ratio) for index, pair in enumerate(pairs)]
        for line, pair in zip(lines, pairs, strict=True):
            if (source := pair.meta.get("source")) is not None:
                line["source"] = str(source)
        return lines

    def figures(self, lines: Sequence[Line]) -> dict[str, Any]:
        whole = [line for line in lines if all(side in line for side in SIDES)]
        found: dict[str, Any] = {}
        if whole:
            found = self._of_pairs(whole)
        if right := [line["chosen"] for line in lines if "chosen" in line]:
            found["perplexity"] = perplexity_bound(right)
        return found

    def values(self, lines: Sequence[Line]) -> dict[str, float]:
        whole = [line for line in lines if all(side in line for side in SIDES)]
        if not whole:
            return {line["id"]: line["chosen"]["score"] for line in lines if "chosen" in line}
        right_P = _preferred(whole)
        return {line["id"]: float(right) for line, right in zip(whole, right_P, strict=True)}

    def _of_pairs(self, lines: Sequence[Line]) -> dict[str, Any]:
        reward_P2 = self._rewards(lines)
        logit_P, right_P = reward_P2[:, 0] - reward_P2[:, 1], _preferred(lines)
        sure_P = 1 / (1 + np.exp(-np.abs(logit_P)))

        def error(index: np.ndarray) -> float:
            return expected_calibration_error(calibration_curve(sure_P[index], right_P[index]))

        def auc(index: np.ndarray) -> float:
            return float(separation(reward_P2[index, 0], reward_P2[index, 1]).mean())

        tokens_P2 = _table(lines, "tokens")
        per_token_P = np.diff(-_table(lines, "score") / np.maximum(1, tokens_P2))[:, 0]
        return {
            "accuracy": mean_figure(right_P),
            "margin": mean_figure(logit_P),
            "auc": figure(auc, len(lines)),
            "calibration_error": figure(error, len(lines)),
            "accuracy_per_token": mean_figure(np.sign(per_token_P) / 2 + 0.5),
            "calibration": calibration_curve(sure_P, right_P),
            "by_length": _by(_length_groups(tokens_P2), right_P),
            "by_longer_side": _by(_longer(tokens_P2), right_P),
            "by_source": _by([line.get("source") for line in lines], right_P),
        }

    def _rewards(self, lines: Sequence[Line]) -> np.ndarray:
        if "log_ratio" in lines[0]["chosen"]:
            return self.beta * _table(lines, "log_ratio")
        return _table(lines, "score")


def _table(lines: Sequence[Line], key: str) -> np.ndarray:
    """[P, 2]."""
    return np.array([[line[side][key] for side in SIDES] for line in lines], dtype=np.float64)


def _preferred(lines: Sequence[Line]) -> np.ndarray:
    """1, 0, or 1/2 where the two differ by no more than rounding makes."""
    score_P2, tokens_P2 = (torch.from_numpy(_table(lines, key)) for key in ("score", "tokens"))
    against_P2 = torch.from_numpy(_table(lines, "log_ratio")) if "log_ratio" in lines[0]["chosen"] else score_P2
    return preferred(against_P2[:, 0] - against_P2[:, 1], size_of(score_P2, tokens_P2)).numpy()


def _length_groups(tokens_P2: np.ndarray) -> list[str | None]:
    """Quarters of the pairs by the tokens of both answers; of few pairs, or of ones alike, fewer groups."""
    total_P = tokens_P2.sum(1)
    ends = np.unique(np.quantile(total_P, np.arange(1, LENGTH_GROUPS) / LENGTH_GROUPS))
    number_P = np.searchsorted(ends, total_P)
    names = {}
    for number in np.unique(number_P):
        inside = total_P[number_P == number]
        names[number] = f"{inside.min():g}-{inside.max():g} tokens"
    return [names[number] for number in number_P]


def _longer(tokens_P2: np.ndarray) -> list[str | None]:
    words = {1.0: "chosen longer", 0.0: "as long", -1.0: "rejected longer"}
    return [words[sign] for sign in np.sign(tokens_P2[:, 0] - tokens_P2[:, 1])]


def _by(groups: Sequence[str | None], right_P: np.ndarray) -> dict[str, Any]:
    """Accuracy by group; nothing where no pair has one."""
    names = sorted({name for name in groups if name is not None}, key=_in_order)
    return {name: mean_figure(right_P[[each == name for each in groups]]) for name in names}


def _in_order(name: str) -> tuple[float, str]:
    head = name.partition("-")[0]
    return (float(head), name) if head.isdigit() else (0.0, name)
