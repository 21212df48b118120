"""Differences between runs on the same held-out items, and whether they may be chance.

Of each item both runs have a value, so the difference is taken item by item; several seeds of the same settings are
averaged first. p is that of the sign-flip permutation test: if neither run were better, every item's difference might
as well have the other sign (for yes/no values this is McNemar's exact test, but for the ties). Holm's correction is for
all runs that are set against the same one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from diffdpo.comparison.groups import ABSENT, Group
from diffdpo.comparison.recorded import RecordedRun
from diffdpo.evaluation.estimate import Estimate, paired_difference
from diffdpo.losses.settings import LossSettings

FLIPS = 20_000
LOSS_SETTINGS = tuple(item.name for item in fields(LossSettings) if item.name != "sft_weight")
REWARD_SETTINGS = ("beta", "model_name_or_path", "ref_model_name_or_path")
MEANS_DEPEND_ON = {
    "loss": LOSS_SETTINGS,
    "rewards/margins": REWARD_SETTINGS,
    "rewards/chosen": REWARD_SETTINGS,
    "rewards/rejected": REWARD_SETTINGS,
}
"""Settings that change what a metric's number means: where they differ, a difference of the numbers says nothing."""


@dataclass(frozen=True)
class Difference:
    """How far a group is from the baseline in one metric. ``change``: None where there is none to speak of, for the
    reason ``why_not``. ``p``: adjusted by Holm."""

    metric: str
    change: Estimate | None = None
    p: float | None = None
    why_not: str = ""


def differences(baseline: Group, others: Sequence[Group], metrics: Sequence[str]) -> dict[str, list[Difference]]:
    """Per metric, the difference of every other group from the baseline."""
    return {metric: _holm([_difference(baseline, other, metric) for other in others]) for metric in metrics}


def _difference(baseline: Group, other: Group, metric: str) -> Difference:
    if metric not in baseline.after or metric not in other.after:
        return Difference(metric, why_not="")
    if unknown := unknown_settings(metric, (baseline.first, other.first)):
        return Difference(metric, why_not=f"settings unknown of {', '.join(unknown)}")
    if unlike := unlike_settings(metric, (baseline.first, other.first)):
        return Difference(metric, why_not=f"another quantity: {', '.join(unlike)}")
    ours, theirs = (_values(group, metric) for group in (baseline, other))
    if ours is None or theirs is None:
        return Difference(metric, why_not="no items kept")
    if ours[0] != theirs[0]:
        return Difference(metric, why_not="other held-out data")
    means = [group.after[metric].mean for group in (baseline, other)]
    if not all(map(math.isfinite, means)) or not ours[1] or not theirs[1]:
        return Difference(metric, why_not="not finite")
    shared = [name for name in ours[1] if name in theirs[1]]
    if not shared:
        return Difference(metric, why_not="no item in common")
    before, after = ([values[name] for name in shared] for values in (ours[1], theirs[1]))
    change = paired_difference(before, after)
    return Difference(metric, change, sign_flip_p(np.subtract(after, before)))


def unknown_settings(metric: str, runs: Sequence[RecordedRun]) -> list[str]:
    """Names of the runs whose settings could not be read, where a metric's numbers depend on them."""
    return [run.name for run in runs if not run.params] if metric in MEANS_DEPEND_ON else []


def has_items(group: Group, metric: str) -> bool:
    """Whether values of a metric item by item are kept, so that a difference can be taken."""
    values = _values(group, metric)
    return metric in group.after and values is not None and len(values[1]) > 0


def unlike_settings(metric: str, runs: Sequence[RecordedRun]) -> list[str]:
    """Settings by which the runs' numbers of a metric mean different things."""
    names = MEANS_DEPEND_ON.get(metric, ())
    unlike = [f"--{name}" for name in names if len({run.params.get(name, ABSENT) for run in runs}) > 1]
    return unlike if len({run.command for run in runs}) == 1 else [*unlike, *(["command"] if names else [])]


def _values(group: Group, metric: str) -> tuple[object, dict[object, float]] | None:
    """(what the items are of, the mean over seeds of each item's value by its name), without the items whose value is
    no number in a seed; None where they are not kept."""
    parts = [_own_values(run, metric) for run in group.measured]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or len({str(part[0]) for part in known}) > 1:
        return None
    names = [name for name in known[0][1] if all(name in part[1] for part in known)]
    return known[0][0], {name: float(np.mean([part[1][name] for part in known])) for name in names}


def _own_values(run: RecordedRun, metric: str) -> tuple[object, dict[object, float]] | None:
    items: Mapping = run.items or {}
    values = items.get("after", {}).get(metric)
    if not values or run.status == "running":
        return None
    of_task = metric in items  # a task's items, whose names are of what is asked; all others are held-out records
    names = items.get(metric if of_task else "records") or []
    data = metric if of_task else items.get("data")
    named = len(names) == len(values) == len(set(names))
    # values of another unit than a record, such as one for each answer: the same only where all records are
    what, keys = (data, names) if named else ((data, tuple(names)), range(len(values)))
    return what, {key: value for key, value in zip(keys, values, strict=True) if math.isfinite(value)}


def sign_flip_p(difference: np.ndarray) -> float:
    """Two-sided p of the mean of ``difference`` under random signs; exact for up to 14 items that differ."""
    moved = difference[difference != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-12)
    if len(moved) <= 14:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ moved) >= observed))
    rng = np.random.Generator(np.random.Philox(0))
    hits = 0
    for _ in range(FLIPS // 1000):
        signs = rng.integers(0, 2, (1000, len(moved)), dtype=np.int8) * 2 - 1
        hits += int(np.sum(np.abs(signs @ moved) >= observed))
    return (hits + 1) / (FLIPS + 1)


def _holm(found: list[Difference]) -> list[Difference]:
    """p adjusted for the number of tests in the list."""
    tested = sorted((i for i, one in enumerate(found) if one.p is not None), key=lambda i: found[i].p or 0.0)
    adjusted, largest = list(found), 0.0
    for rank, index in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * (found[index].p or 0.0)))
        adjusted[index] = replace(found[index], p=largest)
    return adjusted


def beyond_chance(difference: Difference) -> bool:
    """Whether p is below one in twenty."""
    return difference.p is not None and math.isfinite(difference.p) and difference.p < 0.05
