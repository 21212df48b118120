"""DeepSpeed ZeRO 0-3, with or without offload. The JSON says how to shard; batch, clipping and optimizer are ours.

Traps this file knows of (DeepSpeed 0.19): ``gradient_clipping`` is 1.0 unless written; ``"auto"`` is resolved by nobody
but the transformers Trainer; the engine averages over ranks where we add; bf16 under stage 0 takes a wrong first step.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import OptimizerOptions, count_parameters, parameter_groups, trained_parameters
from diffdpo.engine.world import World
from diffdpo.errors import UserError

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")

FOR_GRADIENTS = ("offload_optimizer", "zero_hpz_partition_size", "zero_quantized_gradients")
"""What of "zero_optimization" concerns the backward and the step. (DeepSpeed makes the groups of a hierarchical
partition once a process and fails at a second module that asks for them.)"""

SMALL_SHARE = 0.25  # of trained parameters: whole gradients of a LoRA adapter do not matter beside the frozen weights


class DeepSpeedEngine:
    """A module under ``deepspeed.initialize``."""

    saves_per_process = True

    def __init__(
        self,
        module: nn.Module,
        world: World,
        options: OptimizerOptions,
        *,
        ds_config: Mapping[str, Any],
        micro_batch_size: int,
        accumulation_steps: int,
        bf16: bool,
    ):
        deepspeed = import_deepspeed()
        self.world = world
        self.config = complete_ds_config(
            ds_config,
            options,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            world_size=world.size,
            bf16=bf16,
            cuda=world.device.type == "cuda",
        )
        self.keeps_gradients_sharded = zero_stage(self.config) == 3
        self.hands_gradients_over = hands_gradients_over(self.config, world.size)
        deepspeed.init_distributed(verbose=False)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_placed(module, world, self.config),
            model_parameters=parameter_groups(module, options.weight_decay),
            config=self.config,
        )
        self.module, self.parameters = module, trained_parameters(module)
        self.holding = False  # inside ``unreduced``

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.engine(*inputs)

    def describe(self) -> str:
        zero = self.config["zero_optimization"]
        parts = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
        moved = [f"{what} on {zero[key]['device']}" for key, what in parts.items() if key in zero]
        return ", ".join([f"DeepSpeed ZeRO-{zero_stage(self.config)}", *moved])

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last or self.holding)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # it averages over ranks: undo that

    def why_not_unreduced(self) -> str | None:
        if getattr(self.optimizer, "use_grad_accum_attribute", False):
            return "DeepSpeed's fp32 accumulation (data_types.grad_accum_dtype) keeps gradients out of .grad"
        everything, trained = count_parameters(self.module)
        return why_not_whole_gradients(self.config, self.world.size, few=trained <= SMALL_SHARE * everything)

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        # the boundary must be set before the block, which restores it: ``step`` would do nothing otherwise
        self.engine.set_gradient_accumulation_boundary(True)
        with self.engine.coalesce_grad_reduction():
            self.holding = True
            try:
                yield
            finally:
                self.holding = False

    def why_not_repeat(self) -> str | None:
        stage = zero_stage(self.config)
        if stage == 3:
            return "ZeRO-3 gathers weights inside forwards and cannot take one up again"
        if self.world.size > 1 and self.why_not_unreduced() is not None:
            return f"other processes wait for this one's gradients in every backward of ZeRO-{stage}"
        return None

    def discard(self) -> None:
        self.engine.zero_grad()
        if zero_stage(self.config) in (1, 2):
            _forget(self.optimizer)

    def step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def freeze(self, module: nn.Module) -> Callable[..., torch.Tensor]:
        return freeze(module, self.world, self.config)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        found, _ = self.engine.load_checkpoint(str(folder), tag="engine")
        if found is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint; give a folder under checkpoints/")

    def full_state_dict(self) -> Mapping[str, Any] | None:
        if zero_stage(self.config) < 3:
            return self.engine.module.state_dict() if self.world.is_main else None
        return self.engine._zero3_consolidated_16bit_state_dict()


def freeze(module: nn.Module, world: World, config: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """A module that is never trained: sharded (and offloaded) under ZeRO-3, else whole on the device.

    ``config`` is what ``complete_ds_config`` gave. No engine need be there before.
    """
    module = module.eval().requires_grad_(False)
    if zero_stage(config) < 3:
        return module.to(world.device)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(verbose=False)
    config = {k: v for k, v in config.items() if k not in ("optimizer", "gradient_clipping")}
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k not in FOR_GRADIENTS}
    return deepspeed.initialize(model=_placed(module, world, config), config=config)[0]


def _placed(module: nn.Module, world: World, config: Mapping[str, Any]) -> nn.Module:
    """The module where DeepSpeed wants it: on the device, under ZeRO-3 in shards.

    Weight by weight, each from the host to the device and on to its shard: ``deepspeed.initialize`` alone would first
    put all of the module on the device.
    """
    if zero_stage(config) < 3:
        return module.to(world.device)
    if config["bf16"]["enabled"]:  # what DeepSpeed does to a module that is not in shards yet
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    for buffer in module.buffers():
        buffer.data = buffer.data.to(world.device)
    import_deepspeed().zero.Init(module=module, config_dict_or_path=copy.deepcopy(dict(config)))
    return module


def release(forward: Callable[..., torch.Tensor]) -> None:
    """Free the weights of a module that ``freeze`` made a ZeRO-3 engine of; any other goes with its last reference.

    By emptying them: DeepSpeed keeps references to a destroyed engine and to the module's parameters.
    """
    if not hasattr(forward, "destroy"):
        return
    forward.destroy()
    for parameter in forward.module.parameters():  # type: ignore[attr-defined]
        for held in (parameter, getattr(parameter, "ds_tensor", None)):
            if held is not None:
                held.data = torch.empty(0, dtype=held.dtype, device=held.device)


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


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def hands_gradients_over(config: Mapping[str, Any], world_size: int) -> bool:
    """Whether a backward moves gradients away from the device that made them: to their rank's shard, to the host."""
    stage, offload = zero_stage(config), config.get("zero_optimization", {}).get("offload_optimizer")
    return stage == 3 or (stage == 2 and world_size > 1) or bool(offload and offload.get("device", "none") != "none")


def why_not_whole_gradients(config: Mapping[str, Any], world_size: int, *, few: bool) -> str | None:
    """What stands against whole gradients in ``.grad`` until the end of a step; None where nothing does.

    ``few``: what is trained is small beside the model (LoRA).
    """
    stage = zero_stage(config)
    if stage == 0:
        return "DeepSpeed's stage 0 reduces gradients in every backward (stages 1 to 3 can wait)"
    if few or not hands_gradients_over(config, world_size):
        return None
    what = "offload" if "offload_optimizer" in config["zero_optimization"] else f"sharding of ZeRO-{stage}"
    return f"three whole gradients on every device would undo the {what}"


def complete_ds_config(
    ds_config: Mapping[str, Any],
    options: OptimizerOptions,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    bf16: bool,
    cuda: bool,
) -> dict[str, Any]:
    """The user's sharding and offload with batch sizes, clipping, precision and AdamW filled in.

    A value that is there and contradicts ours is a UserError; ``"auto"`` means ours.
    """
    config = copy.deepcopy(dict(ds_config))
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "gradient_clipping": options.max_grad_norm,
    }
    for key, value in ours.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f"--ds_config sets {key} to {config[key]}, the flags to {value}; leave it out of the JSON")
        config[key] = value
    if config.get("fp16", {}).get("enabled") is True:
        raise UserError("--ds_config enables fp16, whose loss scaling is not supported; use --bf16 or fp32")
    if bf16 and zero_stage(config) == 0:
        raise UserError("--bf16 needs ZeRO stage 1 or more (under stage 0 DeepSpeed's first step is wrong)")
    config["bf16"] = {"enabled": bf16}
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for part in ("offload_optimizer", "offload_param"):
        if not cuda and "pin_memory" in zero.get(part, {}):
            zero[part]["pin_memory"] = False  # page-locked memory is a GPU's matter
    if zero_stage(config) == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    given = config.get("optimizer", {})
    if given.get("type", "AdamW") not in ("AdamW", "Adam"):
        raise UserError(f"--ds_config asks for the optimizer {given['type']}; supported: AdamW")
    params = given.get("params", {})
    ours = {
        "lr": options.learning_rate,
        "betas": list(options.betas),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    for key, value in ours.items():
        if params.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"--ds_config sets optimizer.params.{key} to {params[key]}, the flags to {value}; leave it out of the "
                "JSON"
            )
    config["optimizer"] = {"type": "AdamW", "params": {k: v for k, v in params.items() if v != "auto"} | ours}
    config.setdefault("steps_per_print", 10**9)  # the run's own progress bar says it
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def import_deepspeed() -> Any:
    """``import deepspeed`` with its chatter turned down, and ninja found even when the environment is not activated."""
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
