"""What is measured on held-out data, and how much of it."""

from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.verifiers import VERIFIERS
from diffdpo.settings.base import Settings, setting


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
    num_eval_problems: int = setting(
        200, "held-out problems answered by sampling, before and after; 0: none", at_least=0
    )
    eval_task: str = setting("auto", "who judges sampled answers", choices=("auto", *VERIFIERS, "none"))
