"""DeepSpeed ZeRO 0-3, with or without offload. The JSON says how to shard; batch, clipping and optimizer are ours.

Traps this file knows of (DeepSpeed 0.19): ``gradient_clipping`` is 1.0 unless written; ``"auto"`` is resolved by nobody
but the transformers Trainer; the engine averages over ranks where we add; bf16 under stage 0 takes a wrong first step.
"""

import copy
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from diffdpo.engine.adam_clock import wind_up
from diffdpo.engine.base import FrozenModule, count_parameters, parameter_groups, trained_parameters, trains_few
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.clock import timed
from diffdpo.engine.deepspeed_files import TAG, CheckpointFiles, write_files
from diffdpo.engine.operator_cache import use_kept
from diffdpo.engine.operators import needed_operators
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainFrozen
from diffdpo.engine.saved import fits_beside
from diffdpo.engine.tensor_files import whole_tensors
from diffdpo.engine.world import World
from diffdpo.engine.zero_fill import fill_engine
from diffdpo.engine.zero_swap import fill_swapped, write_swapped
from diffdpo.errors import UserError

LAYOUT = "layout.json"  # beside DeepSpeed's files: who wrote them
STATE_BYTES = 16  # a trained weight, at most: fp32 master and copy, two moments
FOR_GRADIENTS = ("offload_optimizer", "zero_hpz_partition_size", "zero_quantized_gradients")
"""What of "zero_optimization" concerns the backward and the step."""


class DeepSpeedEngine:
    """A module under ``deepspeed.initialize``."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        options: OptimizerOptions,
        *,
        choice: EngineChoice,
        locks: Sequence[IO[str]] = (),
    ):
        """``locks``: of folders on disks that no other run may use, held as long as this engine is there."""
        self.locks, deepspeed = locks, import_deepspeed()
        use_kept(needed_operators(choice.ds_config))
        self.world, self.choice = world, choice
        deepspeed.init_distributed(verbose=False)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_placed(module, world, choice),
            model_parameters=parameter_groups(module, options.weight_decay),
            config=copy.deepcopy(dict(choice.ds_config)),
        )
        # in bf16 its ZeRO 1 and 2 take a step on a gradient that is not finite unless told to look; 3 never does
        self.optimizer.check_grad_overflow = True
        self.module, self.parameters = module, trained_parameters(module)
        self.files = self.engine.checkpoint_engine = CheckpointFiles(self.engine.checkpoint_engine, module)
        self.holding = False  # inside ``no_sync``
        self.loss_factor = float(world.size)  # gradients of parameters are averaged over ranks: undo that

    @timed("forward")
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.engine(*inputs)

    @timed("backward")
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last or self.holding)
        self.engine.backward(loss * self.loss_factor, scale_wrt_gas=False)

    def no_sync_obstacle(self) -> str | None:
        if getattr(self.optimizer, "use_grad_accum_attribute", False):
            return "DeepSpeed's fp32 accumulation (data_types.grad_accum_dtype) keeps gradients out of .grad"
        return self.choice.no_sync_obstacle(few=trains_few(self.module))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        # the boundary must be set before the block, which restores it: ``step`` would do nothing otherwise
        self.engine.set_gradient_accumulation_boundary(True)
        with self.engine.coalesce_grad_reduction():
            self.holding = True
            try:
                yield
            finally:
                self.holding = False

    def retry_obstacle(self) -> str | None:
        return self.choice.retry_obstacle(self.no_sync_obstacle())

    def abort_step(self) -> None:
        self.engine.zero_grad()
        if self.choice.sharding.any and not self.choice.shards_parameters:
            _forget(self.optimizer)

    @timed("optimizer")
    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def freeze(self, module: nn.Module) -> FrozenModule:
        return frozen_by_deepspeed(module, self.world, self.choice, locks=self.locks)

    def save(self, folder: Path) -> None:
        if self.choice.on_nvme:
            write_swapped(folder, self.engine, self.module, self.world)
            return
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        self.files.raise_error()
        if self.world.is_main:
            (folder / LAYOUT).write_text(json.dumps(self._layout()))

    def _layout(self) -> dict[str, Any]:
        """What must be the same for DeepSpeed's own reader."""
        return {**self.choice.identity(), "processes": self.world.size}

    def snapshot(self, beside: World) -> Callable[[Path], None] | None:
        own = -(-count_parameters(self.module)[1] // self.world.size) * STATE_BYTES
        if self.choice.on_nvme or not fits_beside(own):
            return None
        # DeepSpeed's own way to its checkpoint, collectives and all, but for the disk
        with tempfile.TemporaryDirectory() as name, self.files.kept_in_memory(Path(name)) as kept:
            self.save(Path(name))
            others = {path.relative_to(name): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        return lambda folder: write_files(folder, kept, others)

    def load(self, folder: Path) -> None:
        if not self._wrote(folder):
            tensors = whole_tensors(folder, self.module)
            if self.choice.on_nvme:
                fill_swapped(self.engine, self.module, tensors)
            else:
                fill_engine(self.engine, self.module, tensors, stage=self.choice.sharding.stage)
            wind_up(getattr(self.optimizer, "optimizer", self.optimizer))
            return
        # not strictly: weights that are not trained are in no checkpoint
        found, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if found is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint; give a folder under checkpoints/")
        self.files.check_loaded()
        wind_up(getattr(self.optimizer, "optimizer", self.optimizer))

    def _wrote(self, folder: Path) -> bool:
        """Whether an engine like this one did; where it has left no note, the number of its files says so."""
        if self.choice.on_nvme or not (folder / TAG).is_dir():
            return False
        if (note := folder / LAYOUT).is_file():
            return json.loads(note.read_text()) == self._layout()
        return len(list((folder / TAG).glob("*_optim_states.pt"))) in (0, self.world.size)

    def full_state_dict(self) -> Mapping[str, Any] | None:
        if not self.choice.shards_parameters:
            return self.engine.module.state_dict() if self.world.is_main else None
        return self.engine._zero3_consolidated_16bit_state_dict()


class ShardedFrozen:
    """A module that is never trained, in the shards of a ZeRO-3 engine without an optimizer. ``locks``: see
    :class:`DeepSpeedEngine`."""

    def __init__(self, module: nn.Module, world: World, choice: EngineChoice, *, locks: Sequence[IO[str]] = ()):
        self.locks, deepspeed = locks, import_deepspeed()
        use_kept(needed_operators(choice.ds_config))
        deepspeed.init_distributed(verbose=False)
        config = {k: v for k, v in choice.ds_config.items() if k not in ("optimizer", "gradient_clipping")}
        config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k not in FOR_GRADIENTS}
        config["zero_optimization"] |= _elsewhere(config["zero_optimization"])
        placed = _placed(module.eval().requires_grad_(False), world, replace(choice, ds_config=config))
        self.engine = deepspeed.initialize(model=placed, config=copy.deepcopy(config))[0]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.engine(*inputs)

    def release(self) -> None:
        """By emptying the weights: DeepSpeed keeps references to a destroyed engine and to the module's parameters."""
        self.engine.destroy()
        for parameter in self.engine.module.parameters():
            for held in (parameter, getattr(parameter, "ds_tensor", None)):
                if held is not None:
                    held.data = torch.empty(0, dtype=held.dtype, device=held.device)


def frozen_by_deepspeed(
    module: nn.Module, world: World, choice: EngineChoice, *, locks: Sequence[IO[str]] = ()
) -> FrozenModule:
    """A module that is never trained: sharded (and offloaded) under ZeRO-3, else whole on the device. No engine need
    be there before."""
    if not choice.shards_parameters:
        return PlainFrozen(module, world.device)
    return ShardedFrozen(module, world, choice, locks=locks)


def _elsewhere(zero: Mapping[str, Any]) -> dict[str, Any]:
    """A folder of its own for weights on NVMe: DeepSpeed empties the one that it is given, which the policy has."""
    part = zero.get("offload_param") or {}
    if part.get("device") != "nvme":
        return {}
    folder = Path(part["nvme_path"], "reference")
    folder.mkdir(exist_ok=True)
    return {"offload_param": {**part, "nvme_path": str(folder)}}


def _placed(module: nn.Module, world: World, choice: EngineChoice) -> nn.Module:
    """The module where DeepSpeed wants it: on the device, under ZeRO-3 in shards.

    Weight by weight, each from the host to the device and on to its shard: ``deepspeed.initialize`` alone would first
    put all of the module on the device.
    """
    if not choice.shards_parameters:
        return module.to(world.device)
    if choice.bf16:  # what DeepSpeed does to a module that is not in shards yet
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    for buffer in module.buffers():
        buffer.data = buffer.data.to(world.device)
    deepspeed = import_deepspeed()
    if choice.ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        # DeepSpeed makes the groups of a hierarchical partition once a process and fails at the second run that asks
        # for them, though the first one's are gone: they are made anew
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    deepspeed.zero.Init(module=module, config_dict_or_path=copy.deepcopy(dict(choice.ds_config)))
    return module


def _forget(optimizer: Any) -> None:
    """ZeRO-1/2's private state as it is between two steps; a broken backward leaves any of it half done."""
    optimizer._backward_hook_state.backward_active_depth = 0
    optimizer._backward_hook_state.reset_for_new_step()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer._clear_previous_reduced_grads()
    optimizer._release_ipg_buffers()
    optimizer._release_preflattened_grad_buffers()
    optimizer.params_already_reduced[:] = [False] * len(optimizer.params_already_reduced)
    optimizer.micro_step_id = -1
    optimizer.zero_grad(set_to_none=True)
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    optimizer.all_grad_tensors.clear()
    optimizer.averaged_gradients.clear()


def import_deepspeed() -> Any:
    """``import deepspeed`` with its chatter turned down, and ninja found even when the environment is not activated."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
