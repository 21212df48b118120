"""Which of a prompt's answers are set against one another: pure functions of their scores and lengths.

Each gives (chosen, rejected) numbers of answers, in the order in which they are taken. Answers of the same text count
once. ``rng`` decides only which pairs come first, where not all are taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffdpo.settings.pairs import PairingSettings

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Judged:
    """The answers to one prompt, each with its length in tokens and its score."""

    texts: Sequence[str]
    tokens: Sequence[int]
    scores: Sequence[float]

    def usable(self) -> list[int]:
        """Answers that can stand in a pair: of each text the first, and none that is empty."""
        first: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            if text.strip():
                first.setdefault(text, number)
        return list(first.values())


def pairs_of(judged: Judged, settings: PairingSettings, rng: np.random.Generator) -> Pairs:
    """The pairs of one prompt by ``--pairing``, ``--margin`` and ``--max_pairs``."""
    usable, scores = judged.usable(), judged.scores
    right = [i for i in usable if scores[i] >= settings.right_at]
    wrong = [i for i in usable if scores[i] < settings.right_at]
    if settings.pairing == "best_worst":
        found = best_worst(usable, scores)
    elif settings.pairing == "right_wrong":
        found = right_wrong(right, wrong, rng)
    elif settings.pairing == "margin":
        found = apart(usable, scores, rng)
    else:
        found = length_matched(right, wrong, judged.tokens)
    kept = [(i, j) for i, j in found if scores[i] > scores[j] and scores[i] - scores[j] >= settings.margin]
    return kept[: settings.max_pairs or None]


def best_worst(usable: Sequence[int], scores: Sequence[float]) -> Pairs:
    """The best answer against the worst; of equal ones the first."""
    if not usable:
        return []
    return [(max(usable, key=lambda i: scores[i]), min(usable, key=lambda i: scores[i]))]


def right_wrong(right: Sequence[int], wrong: Sequence[int], rng: np.random.Generator) -> Pairs:
    """Every right answer against every wrong one, in an order that uses each answer before any comes again."""
    if not right or not wrong:
        return []
    one, other = rng.permutation(right).tolist(), rng.permutation(wrong).tolist()
    period = math.lcm(len(one), len(other))
    count = len(one) * len(other)
    return [(one[t % len(one)], other[(t + t // period) % len(other)]) for t in range(count)]


def apart(usable: Sequence[int], scores: Sequence[float], rng: np.random.Generator) -> Pairs:
    """Every two answers of different scores, in a random order."""
    found = [(i, j) for i in usable for j in usable if scores[i] > scores[j]]
    return [found[k] for k in rng.permutation(len(found))]


def length_matched(right: Sequence[int], wrong: Sequence[int], tokens: Sequence[int]) -> Pairs:
    """Right against wrong answers, those of the most similar lengths first, each answer in one pair only: what is
    learned from them is not to be longer or shorter."""
    found: Pairs = []
    for i, j in sorted(((i, j) for i in right for j in wrong), key=lambda p: (abs(tokens[p[0]] - tokens[p[1]]), p)):
        if all(i != a and j != b for a, b in found):
            found.append((i, j))
    return found
