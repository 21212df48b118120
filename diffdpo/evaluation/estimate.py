"""A mean with its error bar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the bootstrap: the ends of an interval are then known to about a twentieth of its width
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """``mean`` of ``count`` values and the standard error of that mean (NaN for fewer than two values)."""

    mean: float
    stderr: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Estimate":
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return cls(float("nan"), float("nan"), 0)
        spread = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
        return cls(float(array.mean()), spread / len(array) ** 0.5, len(array))


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean change of the same items, with its standard error."""
    return Estimate.of(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))


def figure(statistic: Callable[[np.ndarray], float], count: int, *, stderr: float | None = None) -> dict[str, Any]:
    """``statistic`` of all ``count`` items, by their numbers, with its bootstrap: ``{mean, stderr, low, high, count}``.

    The interval holds the middle 95 % of the statistic over 1000 samples of as many items, drawn with replacement by a
    generator of fixed seed (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the same items
    give the same ends. ``stderr``: where a formula knows it; else the spread over the samples. None where a single item
    says nothing of it.
    """
    everything = np.arange(count)
    found: dict[str, Any] = {"mean": float(statistic(everything)), "stderr": None, "low": None, "high": None}
    found["count"] = count
    if count < 2:
        return found
    rng = np.random.Generator(np.random.Philox(0))
    sampled = np.array([statistic(rng.integers(0, count, count)) for _ in range(RESAMPLES)])
    sampled = sampled[np.isfinite(sampled)]
    if len(sampled) < 2:
        return found
    ends = np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    found["stderr"] = float(sampled.std(ddof=1)) if stderr is None else stderr
    return found | {"low": float(ends[0]), "high": float(ends[1])}


def mean_figure(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """:func:`figure` of a mean, whose standard error needs no samples."""
    array = np.asarray(values, dtype=np.float64)
    return figure(lambda index: float(array[index].mean()), len(array), stderr=Estimate.of(array).stderr)
