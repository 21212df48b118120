"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: int, kind: str) -> float:
    """Rate of step ``step`` (from 1) of ``total``: linear warm-up, then cosine or linear towards 0, or constant.

    0 itself would be the rate of step ``total + 1``: every step trains.
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup - 1) / max(1, total - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * shapes[kind]
