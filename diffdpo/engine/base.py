"""What a training step needs of whatever holds the weights.

Losses are sums, already divided by the pairs of the global step. So an engine *adds* gradients, over backwards
and over ranks, and never averages: 8 x 1 and 1 x 8 are the same step with no correction factor.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from diffdpo.engine.world import World


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW's settings. ``learning_rate`` is the peak; each step is told its own."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 0.0  # 0: no clipping


class Engine(Protocol):
    """A module wrapped for training."""

    world: World
    module: nn.Module  # as it was before wrapping: for saving and for generation
    keeps_gradients_sharded: bool  # ZeRO-3: a module used twice in one backward loses the sharding
    hands_gradients_over: bool  # in a backward, to other ranks or to the host: ZeRO-2 and 3, offload
    saves_per_process: bool  # what ``save`` writes is read again by as many processes only
    parameters: list[nn.Parameter]  # those that are trained

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's forward."""
        ...

    def describe(self) -> str:
        """In a few words, for the user."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the loss's gradients. ``last`` marks the last backward before ``step``; every rank calls as often."""
        ...

    def why_not_unreduced(self) -> str | None:
        """What stands against ``unreduced`` here, for the user; None where it can be used."""
        ...

    def unreduced(self) -> AbstractContextManager[None]:
        """Inside, gradients add up in ``.grad``, each rank's own, unsharded; when it ends they are reduced.

        Holds all backwards of a step, whatever ``last`` says.
        """
        ...

    def why_not_repeat(self) -> str | None:
        """What stands against taking a step again that broke off (out of memory), for the user; None if nothing."""
        ...

    def discard(self) -> None:
        """Forget the gradients since the last ``step``, also those of a backward that broke off."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero. Returns the gradient's norm before clipping."""
        ...

    def freeze(self, module: nn.Module) -> Callable[..., torch.Tensor]:
        """Hold a second, never trained module (the reference) as this engine holds its own."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into an empty folder; every rank calls."""
        ...

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        ...

    def full_state_dict(self) -> Mapping[str, Any] | None:
        """All weights, gathered on rank 0 (None elsewhere); every rank calls."""
        ...


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, trained): numbers of weights, also of those that ZeRO-3 holds in shards."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that get a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices are decayed, vectors (norms, biases) are not."""
    trainable = trained_parameters(module)
    # ZeRO-3 holds shards of shape (0,); the true shape is in ds_shape
    dims = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trainable]
    matrices = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim >= 2]
    vectors = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
