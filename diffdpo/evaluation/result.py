"""Held-out results of one moment, and what changed between two of them.

A value per item for each metric, items in a fixed order: changes are paired, item by item.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffdpo.evaluation.estimate import Estimate, paired_difference

TITLES = {
    "rewards/accuracies": "preference accuracy (reward margin above 0)",
    "rewards/margins": "reward margin",
    "scores/accuracies": "chosen likelier per token",
    "rewards/separation": "desirable above undesirable (AUC of the reward)",
    "rewards/chosen": "reward of desirable answers",
    "rewards/rejected": "reward of undesirable answers",
    "exact_match": "exact match of sampled answers",
    "multiple_choice": "right choice has the highest score",
}
TASKS = ("exact_match", "multiple_choice")  # several of a kind have the task's name behind it: exact_match/gsm8k
PERCENT = ("rewards/accuracies", "scores/accuracies", "rewards/separation", *TASKS)
DIGITS = 3


@dataclass(frozen=True)
class Evaluation:
    """Held-out results of one moment: a value per item for each metric, items in a fixed order."""

    values: Mapping[str, list[float]]

    def estimates(self) -> dict[str, Estimate]:
        return {key: Estimate.of(values) for key, values in self.values.items()}

    def means(self) -> dict[str, float]:
        return {key: estimate.mean for key, estimate in self.estimates().items()}


def comparison(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Per metric: before, after and the paired change, each {mean, stderr, count}."""
    return {
        key: {
            "before": asdict(Estimate.of(before.values[key])),
            "after": asdict(Estimate.of(after.values[key])),
            "change": asdict(paired_difference(before.values[key], after.values[key])),
        }
        for key in after.values
        if after.values[key] and len(before.values.get(key, ())) == len(after.values[key])
    }


def titles(results: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of the results, with its title; the held-out loss where there is nothing else (supervised runs)."""
    shown = {key: title for key, title in TITLES.items() if key in results}
    for key in results:
        kind, _, task = key.replace("@", "/", 1).partition("/")
        if kind in TASKS and task:
            shown[key] = f"{TITLES[kind]}, {task}"
    return shown or {key: "held-out loss, nats a token" for key in results if key == "loss"}


def cell(key: str, estimate: Mapping[str, float]) -> str:
    mean, stderr = estimate["mean"], estimate["stderr"]
    unknown = "± ?" if math.isnan(stderr) else None  # of a single item
    if key.replace("@", "/").startswith(PERCENT):
        return f"{100 * mean:.1f} {unknown or f'± {100 * stderr:.1f}'} %"
    return f"{mean:+.{DIGITS}f} {unknown or f'± {stderr:.{DIGITS}f}'}"
