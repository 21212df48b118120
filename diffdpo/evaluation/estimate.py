"""A mean with its error bar."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
