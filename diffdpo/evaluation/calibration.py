"""Calibration: do answers that a model is 80 % sure of turn out right in 80 % of the cases?

Shape suffixes: N items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 10


def calibration_curve(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """``bins`` of equal width over [1/2, 1], those with an item: mean confidence, share that is right, how many.

    ``confidence_N``: the probability given to the answer that is held for the better one, at least 1/2; ``right_N``: 1,
    0, or 1/2 for a tie.
    """
    number_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    curve = []
    for number in range(bins):
        inside_N = number_N == number
        if inside_N.any():
            curve.append(
                {
                    "from": 0.5 + number / (2 * bins),
                    "to": 0.5 + (number + 1) / (2 * bins),
                    "confidence": float(confidence_N[inside_N].mean()),
                    "right": float(right_N[inside_N].mean()),
                    "count": int(inside_N.sum()),
                }
            )
    return curve


def expected_calibration_error(curve: Sequence[dict[str, Any]]) -> float:
    """Mean distance of confidence and share right over the bins, each weighted by its items (Naeini et al., AAAI
    2015)."""
    total = sum(each["count"] for each in curve)
    return sum(each["count"] * abs(each["confidence"] - each["right"]) for each in curve) / total if total else 0.0
