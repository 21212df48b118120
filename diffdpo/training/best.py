"""Which evaluation of a run was the best, and whether the run has got no better for too long.

Where it stands goes into every checkpoint, so a resumed run counts on. Evaluations are of the same records all along: a
model that is chosen by a figure of them looks better in it than on new data, and the user is told so.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from diffdpo.config import RunConfig
from diffdpo.errors import UserError


@dataclass
class Standing:
    """``step`` and ``value`` of the best evaluation so far (0: none), how many there were, and how many since the last
    one that was better."""

    step: int = 0
    value: float = math.nan
    evaluations: int = 0
    without_gain: int = 0


@dataclass
class Best:
    """Follows ``metric``. ``patience``: evaluations without a gain of more than ``threshold`` that end a run; 0: none.
    ``keeps``: whether the best model is to be kept."""

    metric: str
    larger: bool
    patience: int = 0
    threshold: float = 0.0
    keeps: bool = False
    standing: Standing = field(default_factory=Standing)

    @classmethod
    def of(cls, config: RunConfig, state: Mapping[str, Any]) -> "Best | None":
        """As the settings and the checkpoint that is resumed say; None where nothing depends on evaluations."""
        if config.best_metric is None:
            return None
        return cls(
            metric=config.best_metric,
            larger=config.larger_is_better,
            patience=config.early_stopping_patience,
            threshold=config.early_stopping_threshold,
            keeps=config.load_best_model_at_end,
            standing=_standing(state.get("best"), config.best_metric),
        )

    def check(self, measured: Mapping[str, float]) -> None:
        """UserError unless the metric is among what is measured."""
        if self.metric not in measured:
            known = ", ".join(sorted(measured)) or "nothing: there are no held-out records"
            raise UserError(f"--metric_for_best_model {self.metric} is not measured here; measured: {known}")

    def add(self, step: int, measured: Mapping[str, float]) -> bool:
        """Note an evaluation; whether it is the best so far. A figure that is no number never is."""
        standing, value = self.standing, measured[self.metric]
        standing.evaluations += 1
        gain = (value - standing.value) * (1 if self.larger else -1)
        better = math.isfinite(value) and (not standing.step or gain > 0)
        if better and (not standing.step or gain > self.threshold):
            standing.without_gain = 0
        else:
            standing.without_gain += 1
        if better:
            standing.step, standing.value = step, value
        return better

    @property
    def stops(self) -> bool:
        """Whether the run has got no better for too long."""
        return bool(self.patience) and self.standing.without_gain >= self.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.standing) | {"metric": self.metric}


def _standing(saved: Mapping[str, Any] | None, metric: str) -> Standing:
    """As it was saved; anew where another metric was followed."""
    if not saved or saved["metric"] != metric:
        return Standing()
    return Standing(**{name: value for name, value in saved.items() if name != "metric"})
