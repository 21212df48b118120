"""The optimizers of ``--optim`` on whole weights, and the state of each as tensors that a checkpoint holds.

adamw_torch        two moments in fp32: 8 bytes a weight
adamw_8bit         two moments in blocks of 256 bytes (bitsandbytes; Dettmers et al., 2110.02861): 2 bytes
paged_adamw_8bit   the same in memory that the driver moves to the host when the GPU is full
adafactor          row and column sums of the second moment (Shazeer and Stern, 1804.04235): next to nothing
muon               orthogonalised momentum (Jordan, 2024) for matrices inside blocks: 4 bytes; AdamW for the rest

AdamW's rate suits all: Muon's is matched to AdamW's update size (2502.16982), and Adafactor's is not relative to a
weight's, as with transformers' trainer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import parameter_groups
from diffdpo.engine.optimizer import EIGHT_BIT, OptimizerOptions
from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu
from diffdpo.optional import fault_of

COUNT = "step"
REBUILT = ("qmap1", "qmap2")  # bitsandbytes' tables, the same for every weight: made anew


def make_optimizer(module: nn.Module, options: OptimizerOptions, device: torch.device) -> torch.optim.Optimizer:
    """Over the trained weights of ``module``. UserError where the library or the device for it is not there."""
    groups = parameter_groups(module, options.weight_decay)
    if options.name in EIGHT_BIT:
        return _eight_bit(groups, options, device)
    if options.name == "adafactor":
        # as transformers' trainer has it (scale_parameter off): relative to a weight's size, as is the default, LoRA's
        # second factor, which starts at 0, would be moved by a thousandth of the rate and learn next to nothing
        return torch.optim.Adafactor(groups, lr=options.learning_rate, eps=(None, 1.0))
    if options.name == "muon":
        return MuonAndAdamW(groups, _in_no_block(module), options, fused=is_gpu(device) or None)
    return _adamw(groups, options, fused=is_gpu(device) or None)


def _adamw(groups: Any, options: OptimizerOptions, *, fused: bool | None) -> torch.optim.AdamW:
    how = {"lr": options.learning_rate, "betas": options.betas, "eps": options.epsilon}
    return torch.optim.AdamW(groups, **how, fused=fused)  # type: ignore[arg-type]


def _eight_bit(groups: Any, options: OptimizerOptions, device: torch.device) -> torch.optim.Optimizer:
    if fault := fault_of("bitsandbytes"):
        raise UserError(f"--optim {options.name}: {fault}; pip install bitsandbytes (of this CUDA), or use adamw_torch")
    if options.name.startswith("paged") and not is_gpu(device):
        raise UserError("--optim paged_adamw_8bit moves to the host what a GPU cannot hold; here use adamw_8bit")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if options.name.startswith("paged") else AdamW8bit
    return kind(groups, lr=options.learning_rate, betas=options.betas, eps=options.epsilon)


def _in_no_block(module: nn.Module) -> set[nn.Parameter]:
    """Embedding and head, whose rows are tokens: Muon is for matrices between activations."""
    from diffdpo.models.architecture.layers import VocabularyHead

    return {
        parameter
        for owner in module.modules()
        if isinstance(owner, (nn.Embedding, VocabularyHead))
        for parameter in owner.parameters()
    }


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on matrices, AdamW on all others, as one optimizer: one list of groups, one state."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], others: set[nn.Parameter], options: OptimizerOptions, *, fused
    ):
        matrices: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in groups:
            for kept, chosen in ((matrices, True), (rest, False)):
                own = [p for p in group["params"] if (p.dim() == 2 and p not in others) is chosen]
                kept += [{**group, "params": own}] if own else []
        how: Any = {"lr": options.learning_rate, "adjust_lr_fn": "match_rms_adamw"}
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, **how)] if matrices else []
        self.parts += [_adamw(rest, options, fused=fused)] if rest else []
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state  # type: ignore[assignment]  # one place to save from and to read into

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of both optimizers."""
        for part in self.parts:
            part.step()


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What it keeps of a weight, by name; empty before its first step. A count that is a number becomes a tensor."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        for name, value in state.items()
        if name not in REBUILT and value is not None
    }


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The state of every weight as it is after a first step, of zeros, to be read into; weights stay as they are."""
    held = [(p, p.detach().clone(), p.grad) for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter, _, _ in held:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    with torch.no_grad():
        for parameter, value, gradient in held:
            parameter.copy_(value)
            parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def take_counts(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, count: torch.Tensor) -> None:
    """Put a count that the optimizer keeps as a number in its place."""
    state = optimizer.state[parameter]
    if not isinstance(state.get(COUNT, count), torch.Tensor):
        state[COUNT] = int(count)
