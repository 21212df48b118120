"""What is measured on held-out data, how much of it, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting
from diffdpo.settings.tasks import MULTIPLE_CHOICE, TaskName, task_names

AUTO, NONE = "auto", "none"
EXACT_MATCH = "exact_match"
SMALLER_IS_BETTER = ("loss", "perplexity")  # endings of metrics' names


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """Held-out records and problems, before, during and after training."""

    title: ClassVar[str] = "evaluation"

    per_device_eval_batch_size: int = setting(16, "records in a batch of one process in evaluation", at_least=1)
    eval_steps: int | float = setting(
        0, "steps between evaluations, or their share of all; 0: before and after", at_least=0, share=True, common=True
    )
    max_eval_pairs: int = setting(
        256,
        "held-out records scored in an evaluation: drawn once, the same for every batch and seed; 0: all",
        at_least=0,
    )
    num_eval_problems: int = setting(200, "held-out problems of each task, before and after; 0: none", at_least=0)
    eval_task: str = setting(
        AUTO,
        "multiple_choice or who judges sampled answers, each with @FILE for its problems; or none",
        many=True,
    )
    load_best_model_at_end: bool = setting(
        False, "end with the checkpoint that was best by --metric_for_best_model, not with the last"
    )
    metric_for_best_model: str = setting("loss", "held-out metric, such as rewards/accuracies or exact_match")
    greater_is_better: bool | None = setting(None, "of that metric; default: unless its name ends in loss")
    early_stopping_patience: int = setting(
        0, "evaluations in a row without a better metric that end a run; 0: none do", at_least=0
    )
    early_stopping_threshold: float = setting(0.0, "by how much better counts", at_least=0)

    @property
    def best_metric(self) -> str | None:
        """The metric that decides which model is the best, by our name; None where nothing depends on it."""
        if not (self.load_best_model_at_end or self.early_stopping_patience):
            return None
        return self.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")

    @property
    def larger_is_better(self) -> bool:
        """Whether more of that metric is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)

    def check(self) -> None:
        """There are such tasks; and what follows from evaluations has evaluations to follow from."""
        training_tasks(self.eval_task, generated=False)
        if self.best_metric is not None and not self.eval_steps:
            flag = "--load_best_model_at_end" if self.load_best_model_at_end else "--early_stopping_patience"
            raise UserError(f"{flag} needs evaluations between steps: give --eval_steps")


def training_tasks(text: str, *, generated: bool) -> list[TaskName]:
    """The tasks of ``--eval_task``. ``generated``: whether the data are the generated problems, which auto judges.
    UserError or DataError for what is no task."""
    if text == AUTO:
        return [TaskName("arithmetic")] if generated else []
    return [] if text == NONE else task_names(text, flag="--eval_task", scored=(MULTIPLE_CHOICE,))


def metric_of_task(name: TaskName, among: Sequence[TaskName]) -> str:
    """What a task's metric is called: by its kind of figure, and where several are of one kind, with the task's name
    (and file) behind it."""
    kind = EXACT_MATCH if name.is_sampled else MULTIPLE_CHOICE
    alike = [each for each in among if each.is_sampled == name.is_sampled]
    if len(alike) == 1:
        return kind
    same = [each for each in alike if each.kind == name.kind]
    own = f"{kind}/{name.kind}" if name.is_sampled else kind
    return own if len(same) == 1 else f"{own}@{name.source or 'held_out'}"
