"""What a run measures on held-out data, and the files that keep it item by item."""

from collections.abc import Mapping
from typing import Protocol

from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.evaluation.item_file import ItemFile
from diffdpo.evaluation.result import Evaluation
from diffdpo.evaluation.samples import SampleFile
from diffdpo.tracking.run import Tracking
from diffdpo.training.checkpoint import told_if_unwritable
from diffdpo.training.loop import Loop


class HeldOut(Protocol):
    """What a command measures on held-out data."""

    tasks: HeldOutTasks

    def evaluate(self, when: str) -> Evaluation:
        """Measure everything, before or after."""
        ...

    def quick(self) -> dict[str, float]:
        """Means of what is cheap enough for between steps."""
        ...

    def names(self) -> Mapping[str, list[str]]:
        """The items of an evaluation, in the order of its values."""
        ...


class Measured:
    """Evaluations of everything, written to ``held_out.json`` and ``answers.jsonl`` on the rank that tracks the run."""

    def __init__(self, held_out: HeldOut, tracking: Tracking | None, *, data: str | None, resume_step: int | None):
        self.held_out, self.items, self.samples = held_out, None, None
        names = held_out.names()
        if tracking is not None:
            self.folder = tracking.output_dir
            self.items = ItemFile(self.folder, data, names)
            with told_if_unwritable(self.folder):
                self.samples = SampleFile(self.folder, resume_step)
            held_out.tasks.on_sampled = self.samples.add

    def follow(self, loop: Loop) -> None:
        """Answers that are sampled from now on belong to the loop's steps."""
        if self.samples is not None:
            self.samples.step = lambda: loop.done

    def evaluate(self, when: str) -> Evaluation:
        """Measure everything, before or after."""
        return self._kept(when, self.held_out.evaluate(when))

    def again(self, before: Evaluation) -> Evaluation:
        """What a checkpoint knows of the moment before training."""
        return self._kept("before", before)

    def _kept(self, when: str, evaluation: Evaluation) -> Evaluation:
        if self.items is not None:
            with told_if_unwritable(self.folder):
                self.items.write(when, evaluation)
        return evaluation
