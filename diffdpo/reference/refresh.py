"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): every so many steps it moves towards it."""

from collections.abc import Sequence

import torch
from torch import nn

from data_pipeline.batch import PairBatch
from diffdpo.step.report import StepReport
from diffdpo.step.step import PreferenceStep


class RefreshingStep:
    """A preference step, after every ``every``-th of which the reference becomes α · policy + (1 - α) · reference.

    Which step it is follows from the batch, so a run that is resumed refreshes where it would have.
    """

    def __init__(self, step: PreferenceStep, reference: nn.Module, *, alpha: float, every: int, steps_per_epoch: int):
        self.step, self.reference = step, reference
        self.alpha, self.every, self.steps_per_epoch = alpha, every, steps_per_epoch

    def __call__(self, micro_batches: Sequence[PairBatch], learning_rate: float) -> StepReport:
        report = self.step(micro_batches, learning_rate)
        batch = micro_batches[0]
        if (batch.epoch * self.steps_per_epoch + batch.step + 1) % self.every == 0:
            mix_in(self.reference, self.step.engine.module, alpha=self.alpha)
        return report


@torch.no_grad()
def mix_in(reference: nn.Module, policy: nn.Module, *, alpha: float) -> None:
    """Move every weight of ``reference`` the part ``alpha`` of its way to that of ``policy``, a module like it."""
    own = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.mul_(1 - alpha).add_(own[name].to(parameter), alpha=alpha)
