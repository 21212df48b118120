"""What of the peak is weights, gradients and optimizer: counted while the optimizer takes a run's first step."""

from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import Engine
from diffdpo.engine.held import DEVICE, held_bytes
from diffdpo.memory.peak import GIB
from diffdpo.step.report import StepReport
from diffdpo.training.callbacks import Callback


class HeldMemory(Callback):
    """Counts in every call of the optimizer until the first step is over: some engines step group by group, so each
    part is the most that was seen. ``reference``: a second module in memory."""

    def __init__(self, engine: Engine, reference: nn.Module | None):
        self.engine, self.reference = engine, reference
        self.bytes: dict[tuple[str, str], int] = {}  # by place and part, of this process
        optimizer: Any = engine.optimizer
        stepping = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's holds the one that steps
        self.hooks: list[Any] = []
        if isinstance(stepping, torch.optim.Optimizer):
            self.hooks = [stepping.register_step_pre_hook(self._count), stepping.register_step_post_hook(self._count)]

    def _count(self, *_: Any) -> None:
        for name, size in held_bytes(self.engine, self.reference).items():
            self.bytes[name] = max(size, self.bytes.get(name, 0))

    def gib(self, peak: float) -> dict[str, dict[str, float]]:
        """By place and part; ``peak``: GiB of this process on its device, of which the parts leave ``other``."""
        found: dict[str, dict[str, float]] = {DEVICE: {}}
        for (where, part), size in self.bytes.items():
            found.setdefault(where, {})[part] = size / GIB
        found[DEVICE]["other"] = max(0.0, peak - sum(found[DEVICE].values()))
        return found

    def on_step(self, step: int, report: StepReport) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.reference = [], None
