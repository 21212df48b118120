"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math


def learning_rate(step: int, *, peak: float, total: int, warmup: int, kind: str) -> float:
    """Rate of step ``step`` (from 1) of ``total``: linear warm-up, then cosine or linear to 0, or constant."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * shapes[kind]
