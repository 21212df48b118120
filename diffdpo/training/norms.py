"""Gradient norms that are far from those before them: often a record that should not be in the data."""

import statistics
from collections import deque

LATELY, ENOUGH, FAR = 100, 20, 10.0


class NormHistory:
    """The norms of the last steps. It starts empty when a run goes on: it decides nothing, it only tells."""

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=LATELY)

    def add(self, norm: float) -> float | None:
        """How many times the median of late a norm is, where that is far; None otherwise. It joins the history."""
        usual = statistics.median(self.norms) if len(self.norms) >= ENOUGH else 0.0
        self.norms.append(norm)
        return norm / usual if usual > 0 and norm > FAR * usual else None
