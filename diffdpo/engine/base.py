"""What a training step needs of whatever holds the weights.

Losses are sums, already divided by the pairs of the global step. So an engine *adds* gradients, over backwards
and over ranks, and never averages: 8 x 1 and 1 x 8 are the same step with no correction factor.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from diffdpo.engine.choice import SMALL_SHARE, EngineChoice
from diffdpo.engine.world import World


class FrozenModule(Protocol):
    """A second module that is never trained (the reference), held as the engine holds its own."""

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's forward."""
        ...

    def release(self) -> None:
        """Free its weights; it cannot be called any more."""
        ...


class Engine(Protocol):
    """A module wrapped for training."""

    choice: EngineChoice  # how the weights are held
    world: World
    module: nn.Module  # as it was before wrapping: for saving and for generation
    parameters: list[nn.Parameter]  # those that are trained
    optimizer: Any  # torch's, or what DeepSpeed puts round one
    loss_factor: float  # what ``backward`` multiplies a loss by: tensors that are no parameters get so much gradient

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's forward."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the loss's gradients. ``last`` marks the last backward before ``step``; every rank calls as often."""
        ...

    def no_sync_obstacle(self) -> str | None:
        """What stands against ``no_sync`` here, for the user; None where it can be used."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients add up in ``.grad``, each rank's own, unsharded; when it ends they are reduced.

        Holds all backwards of a step, whatever ``last`` says.
        """
        ...

    def retry_obstacle(self) -> str | None:
        """What stands against taking a step again that broke off (out of memory), for the user; None if nothing."""
        ...

    def abort_step(self) -> None:
        """Forget the gradients since the last ``step``, also those of a backward that broke off."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero. Returns the gradient's norm before clipping.

        Where that is not finite on any rank no step is taken: weights and moments stay as they were on all.
        """
        ...

    def freeze(self, module: nn.Module) -> FrozenModule:
        """Hold a module that is never trained as this engine holds its own."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into an empty folder; every rank calls."""
        ...

    def snapshot(self, beside: World) -> Callable[[Path], None] | None:
        """What ``save`` would write now, copied, as a function that writes it into a folder: every rank calls it in a
        thread while steps go on, and it talks to the others through ``beside`` alone. None where the copy needs too
        much memory, or what is saved lies on a disk."""
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


def trains_few(module: nn.Module) -> bool:
    """Whether what is trained is small beside the rest, as a LoRA adapter: whole gradients of it hardly count."""
    everything, trained = count_parameters(module)
    return trained <= SMALL_SHARE * everything


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def sum_gradients(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, of weights that each holds whole: one sum of one flat tensor."""
    if world.size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = world.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: matrices are decayed, vectors (norms, biases) are not."""
    trainable = trained_parameters(module)
    # ZeRO-3 holds shards of shape (0,); the true shape is in ds_shape
    dims = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trainable]
    matrices = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim >= 2]
    vectors = [parameter for parameter, dim in zip(trainable, dims, strict=True) if dim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
