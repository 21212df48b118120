"""One process, or several with one flat sum of the gradients: no library, every number can be followed."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import parameter_groups, trained_parameters
from diffdpo.engine.choice import PLAIN, EngineChoice
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import World


class PlainFrozen:
    """A module that every rank holds whole on its device and nobody trains."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module: nn.Module | None = module.to(device).eval().requires_grad_(False)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        assert self.module is not None, "released"
        return self.module(*inputs)

    def release(self) -> None:
        self.module = None


class PlainEngine:
    """torch's AdamW on a module that every rank holds whole."""

    def __init__(self, module: nn.Module, world: World, options: OptimizerOptions):
        self.choice = EngineChoice(PLAIN, world.size)
        self.module, self.world, self.options = module.to(world.device), world, options
        self.parameters = trained_parameters(module)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, options.weight_decay),
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            fused=world.device.type == "cuda" or None,
        )

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def no_sync_obstacle(self) -> str | None:
        return None

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # nothing is reduced before ``step``

    def retry_obstacle(self) -> str | None:
        return None

    def abort_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> float:
        self._sum_gradients()
        limit = self.options.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = self.world.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, piece in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def freeze(self, module: nn.Module) -> PlainFrozen:
        return PlainFrozen(module, self.world.device)

    def save(self, folder: Path) -> None:
        if self.world.is_main:
            state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.world.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def full_state_dict(self) -> Mapping[str, Any] | None:
        return self.module.state_dict() if self.world.is_main else None
