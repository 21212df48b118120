"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

Names, arguments and defaults are those of transformers' schedules, and after the warm-up the rates are too. In the
warm-up ours are a step ahead: there the first step has rate 0 and changes nothing, here every step trains.
``settings/schedule.py`` declares the flags.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from diffdpo.settings.base import Settings

Config = TypeVar("Config", bound=Settings)


@dataclass(frozen=True)
class Progress:
    """Where a step stands. ``since`` counts the steps done after the warm-up: 0 for the first of them."""

    since: int
    warmup: int
    total: int
    peak: float

    @property
    def share(self) -> float:
        """The share of the steps after the warm-up that is done, in [0, 1)."""
        return self.since / max(1, self.total - self.warmup)


def learning_rate(
    step: int, *, peak: float, total: int, warmup: int, kind: str, arguments: Mapping[str, Any] | None = None
) -> float:
    """Rate of step ``step`` (from 1) of ``total``: linear warm-up over ``warmup`` steps, then the schedule ``kind``.

    A schedule that falls to 0 would reach it at step ``total + 1``: every step trains.
    """
    given = dict(arguments or {})
    if step <= warmup and kind != "constant":
        return peak * _warm_up(step, warmup, kind, given)
    given = {name: value for name, value in given.items() if name not in OF_WARM_UP}
    return peak * max(0.0, SCHEDULES[kind](Progress(step - warmup - 1, warmup, total, peak), **given))


def resolve_steps(value: int | float, total: int) -> int:
    """A number of steps from a number, or from a share of ``total`` that is below 1: rounded up, at least 1."""
    # a share such as 1/3 is off by an ulp, which must not round up to a step more
    return max(1, math.ceil(round(value * total, 6))) if 0 < value < 1 else int(value)


def in_steps(config: Config, total: int) -> Config:
    """The settings with their shares of all steps as steps."""
    shares = [item.name for item in fields(config) if item.metadata.get("share")]
    return replace(config, **{name: resolve_steps(getattr(config, name), total) for name in shares})


# -------------------------------------------------------------------------- after the warm-up, as a share of the peak


def linear(at: Progress) -> float:
    """1 → 0."""
    return 1 - at.share


def cosine(at: Progress, *, num_cycles: float = 0.5) -> float:
    """½ (1 + cos 2π c x): 1 → 0 along half a wave."""
    return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * at.share))


def cosine_with_restarts(at: Progress, *, num_cycles: float = 1) -> float:
    """``cosine`` that starts again from 1, ``num_cycles`` times in all."""
    return 0.5 * (1 + math.cos(math.pi * (num_cycles * at.share % 1.0)))


def polynomial(at: Progress, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    """(1 - e) (1 - x)^p + e with e = ``lr_end`` / peak."""
    end = lr_end / at.peak
    return (1 - end) * (1 - at.share) ** power + end


def constant(at: Progress) -> float:
    """1, without a warm-up."""
    return 1.0


def constant_with_warmup(at: Progress) -> float:
    """1, after the warm-up."""
    return 1.0


def inverse_sqrt(at: Progress, *, timescale: int | None = None) -> float:
    """√(τ / (τ + steps)), τ = ``timescale``: by default the warm-up, or 10 000 without one."""
    tau = timescale or at.warmup or 10_000
    return 1 / math.sqrt((at.since + tau) / tau)


def cosine_with_min_lr(
    at: Progress, *, num_cycles: float = 0.5, min_lr: float | None = None, min_lr_rate: float = 0.0
) -> float:
    """``cosine`` from 1 down to ``min_lr`` / peak, or to ``min_lr_rate``."""
    end = min_lr_rate if min_lr is None else min_lr / at.peak
    return (1 - end) * cosine(at, num_cycles=num_cycles) + end


def cosine_warmup_with_min_lr(
    at: Progress, *, num_cycles: float = 0.5, min_lr: float | None = None, min_lr_rate: float = 0.0
) -> float:
    """``cosine_with_min_lr`` a step further on, so that the last step has the least rate."""
    ahead = Progress(at.since + 1, at.warmup, at.total, at.peak)
    return cosine_with_min_lr(ahead, num_cycles=num_cycles, min_lr=min_lr, min_lr_rate=min_lr_rate)


def warmup_stable_decay(
    at: Progress,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    """1 while stable (by default what warm-up and decay leave), then down to ``min_lr_ratio``, and on at that."""
    stable = at.total - at.warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    if at.since < stable:
        return 1.0
    done = (at.since - stable) / max(1, num_decay_steps)
    if done >= 1:
        return min_lr_ratio
    falls = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(2 * math.pi * num_cycles * done)),
        "1-sqrt": 1 - math.sqrt(done),
    }
    return (1 - min_lr_ratio) * falls[decay_type] + min_lr_ratio


SCHEDULES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        *(linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt),
        *(cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay),
    )
}

# -------------------------------------------------------------------------------------------- the warm-up

OF_WARM_UP = ("warmup_type", "warmup_lr_rate")


def _warm_up(step: int, warmup: int, kind: str, given: Mapping[str, Any]) -> float:
    """The share of the peak in the warm-up. Linear, but for the arguments of two schedules."""
    done = step / warmup
    if kind == "warmup_stable_decay":
        rises = {
            "linear": done,
            "cosine": 0.5 * (1 - math.cos(math.pi * done)),
            "1-sqrt": 1 - math.sqrt(1 - done),
        }
        least = given.get("min_lr_ratio", 0.0)
        return (1 - least) * rises[given.get("warmup_type", "linear")] + least
    if kind == "cosine_warmup_with_min_lr" and "warmup_lr_rate" in given:
        start = given["warmup_lr_rate"]
        return start + (1 - start) * (step - 1) / max(1, warmup - 1)
    return done
