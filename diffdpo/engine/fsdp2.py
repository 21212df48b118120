"""FSDP2 (``fully_shard``): every process holds 1/N of weights, gradients and AdamW's state, by torch alone.

Weights that are trained are fp32; where a run is in bf16 they are cast as they are gathered, and gradients are reduced
in fp32. Frozen weights are held in bf16. What is trained beside frozen weights (an adapter) is small and stays whole
and fp32 on every process; its gradients are summed once a step, as by the plain engine.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from diffdpo.engine.base import parameter_groups, sum_gradients, trained_parameters
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.clock import timed
from diffdpo.engine.fsdp2_units import cut_units, gathered, is_cut, own_part
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.saved import fits_beside
from diffdpo.engine.tensor_files import read_training_state, training_state, write_tensors
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.backbone import native


class Fsdp2Engine:
    """torch's AdamW on shards."""

    loss_factor = 1.0

    def __init__(self, module: nn.Module, world: World, options: OptimizerOptions, *, choice: EngineChoice):
        self.choice, self.world, self.module, self.options = choice, world, module, options
        # not by what is frozen: a mixture of experts trained whole has frozen routers, which are cut with the rest
        self.adapter = trained_parameters(module) if hasattr(module.model, "peft_config") else []
        kept = [p for p in module.parameters() if getattr(p, "stays_whole", False)]  # the adapter as it started
        shard(module, world, choice, whole=[*self.adapter, *kept])
        self.parameters = trained_parameters(module)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, options.weight_decay),
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            fused=True if self.fused else None,
        )

    @property
    def fused(self) -> bool:
        """Whether one kernel takes all of AdamW's step: on a GPU, and on the host for shards that live there."""
        return is_gpu(self.world.device) or self.choice.sharding.offloads_optimizer

    @timed("forward")
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)

    @timed("backward")
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def no_sync_obstacle(self) -> str | None:
        return self.choice.no_sync_obstacle(few=bool(self.adapter))

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # an adapter's gradients are summed in ``step``

    def retry_obstacle(self) -> str | None:
        return self.choice.retry_obstacle(self.no_sync_obstacle())

    def abort_step(self) -> None:
        self.module.reset_iter_state()  # type: ignore[operator]
        self.optimizer.zero_grad(set_to_none=True)

    @timed("optimizer")
    def step(self, learning_rate: float) -> float:
        self._reshard()
        if self.adapter:
            sum_gradients(self.world, self.adapter)
        norm = self._clip()
        if not math.isfinite(norm):  # the same on every rank
            self.abort_step()
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _reshard(self) -> None:
        """Drop gathered weights that a forward without a backward has left: they are about to be out of date."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _clip(self) -> float:
        """Scale gradients down to the largest norm allowed; the norm before."""
        own = [own_part(p.grad) for p in self.parameters if p.grad is not None]
        square = torch.zeros((), device=own_part(self.parameters[0]).device)
        for gradient in own:
            square += gradient.float().square().sum()
        if not self.adapter:  # each copy of the weights has the whole sum
            square = self.world.all_reduce_sum(square.to(self.world.device)) * self.choice.sharding.over
            square = square / self.world.size
        norm = float(square.sqrt())
        scale = self.options.max_grad_norm / (norm + 1e-6) if self.options.max_grad_norm else 1.0
        if scale < 1.0:
            torch._foreach_mul_(own, scale)
        return norm

    def freeze(self, module: nn.Module) -> "Fsdp2Frozen":
        return Fsdp2Frozen(module, self.world, self.choice)

    def save(self, folder: Path) -> None:
        self._reshard()
        write_tensors(folder, training_state(self.module, self.optimizer))

    def snapshot(self, beside: World) -> Callable[[Path], None] | None:
        self._reshard()
        saved = training_state(self.module, self.optimizer)
        if not fits_beside(sum(own_part(tensor).nbytes for tensor in saved.values())):
            return None
        copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in saved.items()}
        return lambda folder: write_tensors(folder, copy, beside.group)

    def load(self, folder: Path) -> None:
        self._reshard()
        read_training_state(folder, self.module, self.optimizer, fused=self.fused)

    def full_state_dict(self) -> Mapping[str, Any] | None:
        """The adapter alone where one is trained: nobody needs the frozen weights gathered."""
        self._reshard()
        state = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or not self.adapter:
                whole = gathered(parameter, self.world.device)
                state[name] = whole.cpu() if self.world.is_main else None
        return state if self.world.is_main else None


class Fsdp2Frozen:
    """A module that is never trained, in shards (in bf16 where the run is)."""

    def __init__(self, module: nn.Module, world: World, choice: EngineChoice):
        module = module.eval().requires_grad_(False)
        if choice.bf16 and not is_cut(native(module.model)):  # type: ignore[arg-type]
            module = module.bfloat16()
        self.module: nn.Module | None = shard(module, world, choice)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        assert self.module is not None, "released"
        return self.module(*inputs)

    def release(self) -> None:
        self.module = None


def shard(
    module: nn.Module, world: World, choice: EngineChoice, *, whole: list[nn.Parameter] | None = None
) -> nn.Module:
    """Cut a scoring module's weights, in place, where reading them has not done so. ``whole``: trained weights
    that are left as they are, on the device."""
    if isinstance(module, FSDPModule):
        return module
    whole = whole or []
    model = native(module.model)  # type: ignore[arg-type]
    if not is_cut(model):
        cut_units(model, choice, world, whole=whole)
    outside = {name: p for name, p in module.named_parameters() if not isinstance(p, DTensor)}
    for name, parameter in outside.items():
        parameter.data = parameter.data.to(world.device)
        if parameter.requires_grad and not any(parameter is one for one in whole):
            raise RuntimeError(f"{name} is in no unit of FSDP2, so nobody would add up its gradients")
    embedding = cast(DTensor, model.embed.weight)
    fully_shard(module, ignored_params=set(module.parameters()), mesh=embedding.device_mesh)
    # of all units the root, now: else the first unit that somebody calls by itself would be one
    fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
    return module
