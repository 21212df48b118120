"""What a caller of ``diffdpo.train`` may hear of a run, and the one thing it may ask: to stop."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdpo.errors import UserError
from diffdpo.step.report import StepReport


class Callback:
    """Derive from it and override what is of interest. Every process calls; what is given is not to be changed."""

    def on_step(self, step: int, report: StepReport) -> bool | None:
        """After each optimizer step. True asks to stop: a checkpoint is saved and the run ends as if told by a signal.

        Every process must ask alike, or one alone: the run stops where any does.
        """

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation at ``step``; the means of what was measured, by name."""

    def on_save(self, step: int, folder: Path) -> None:
        """After a checkpoint of ``step`` is whole in ``folder``."""

    def on_end(self, step: int) -> None:
        """After the last step of this run, complete or stopped; not after an error."""


def each_of(callbacks: Any) -> tuple[Callback, ...]:
    """One callback or several as a tuple. UserError for what is none."""
    each = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for one in each:
        if not isinstance(one, Callback):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise UserError(f"callbacks holds {what}; give objects of classes derived from diffdpo.Callback")
    return each


class Callbacks(Callback):
    """Several as one."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self.callbacks = tuple(callbacks)

    def on_step(self, step: int, report: StepReport) -> bool:
        """Whether any asks to stop; all are told."""
        asked = [each.on_step(step, report) for each in self.callbacks]
        return any(asked)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for each in self.callbacks:
            each.on_evaluation(step, metrics)

    def on_save(self, step: int, folder: Path) -> None:
        for each in self.callbacks:
            each.on_save(step, folder)

    def on_end(self, step: int) -> None:
        for each in self.callbacks:
            each.on_end(step)
