"""One process, or several with one flat sum of the gradients: no library, every number can be followed."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from diffdpo.engine.base import sum_gradients, trained_parameters
from diffdpo.engine.choice import PLAIN, EngineChoice
from diffdpo.engine.clock import timed
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.optimizer_kinds import make_optimizer, state_tensors
from diffdpo.engine.row_slices import RowSlices, row_slices, slice_rows
from diffdpo.engine.saved import fits_beside, save_tensors, trained_by_name
from diffdpo.engine.tensor_files import read_training_state
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class PlainFrozen:
    """A module that every rank holds whole on its device and nobody trains."""

    def __init__(self, module: nn.Module, device: torch.device, slices: RowSlices | None = None):
        slice_rows(module, slices)
        self.module: nn.Module | None = module.to(device).eval().requires_grad_(False)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        assert self.module is not None, "released"
        return self.module(*inputs)

    def release(self) -> None:
        self.module = None


class PlainEngine:
    """An optimizer on a module that every rank holds whole."""

    loss_factor = 1.0

    def __init__(
        self, module: nn.Module, world: World, options: OptimizerOptions, *, choice: EngineChoice | None = None
    ):
        self.choice = choice or EngineChoice(PLAIN, world.size)
        self.module, self.world, self.options = module.to(world.device), world, options
        self.slices = row_slices(self.choice, world)
        slice_rows(module, self.slices)
        self.parameters = trained_parameters(module)
        self.beside: dict[str, nn.Module] = {}  # modules that change without being trained, saved with the rest
        self.fused = is_gpu(world.device)
        self.optimizer = make_optimizer(self.module, options, world.device)

    @timed("forward")
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)

    @timed("backward")
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def no_sync_obstacle(self) -> str | None:
        return self.choice.no_sync_obstacle(few=False)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # nothing is reduced before ``step``

    def retry_obstacle(self) -> str | None:
        return self.choice.retry_obstacle(self.no_sync_obstacle())

    def abort_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @timed("optimizer")
    def step(self, learning_rate: float) -> float:
        sum_gradients(self.world, self.parameters)
        limit = self.options.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        if not math.isfinite(norm):  # such a step would spoil every weight and both moments
            self.abort_step()
            return float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def freeze(self, module: nn.Module) -> PlainFrozen:
        return PlainFrozen(module, self.world.device, self.slices)

    def save(self, folder: Path) -> None:
        if self.world.is_main:
            _write(self._saved(), folder)

    def _saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """By file: the trained weights, and what the optimizer keeps of each."""
        trained = trained_by_name(self.module)
        states = {name: state_tensors(self.optimizer, p) for name, p in trained.items()}
        moments = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
        saved = {WEIGHTS: {name: p.detach() for name, p in trained.items()}, OPTIMIZER: moments}
        for name, module in self.beside.items():  # in a folder: the files here are read as one state
            saved[f"{name}/{WEIGHTS}"] = {key: p.detach() for key, p in module.named_parameters()}
        return saved

    def snapshot(self, beside: World) -> Callable[[Path], None] | None:
        if not self.world.is_main:
            return lambda folder: None
        saved = self._saved()
        size = sum(tensor.nbytes for file in saved.values() for tensor in file.values())
        if not fits_beside(size):
            return None
        copy = {
            file: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for file, tensors in saved.items()
        }
        return lambda folder: _write(copy, folder)

    def load(self, folder: Path) -> None:
        read_training_state(folder, self.module, self.optimizer, fused=self.fused)
        for name, module in self.beside.items():
            file = folder / name / WEIGHTS
            if not file.is_file():
                raise UserError(f"{folder} holds no {name} that moves; resume the run that wrote it with its settings")
            tensors = load_file(file, device=str(self.world.device))
            with torch.no_grad():
                for key, parameter in module.named_parameters():
                    parameter.copy_(tensors[key])

    def full_state_dict(self) -> Mapping[str, Any] | None:
        return self.module.state_dict() if self.world.is_main else None


def _write(saved: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    for file, tensors in saved.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_tensors(tensors, folder / file)
