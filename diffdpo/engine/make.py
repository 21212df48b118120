"""From the choice of an engine to the engine: the one place that knows them all."""

from collections.abc import Callable

import torch
from torch import nn

from diffdpo.engine.accelerate_file import check_accelerate
from diffdpo.engine.base import Engine, FrozenModule
from diffdpo.engine.choice import DEEPSPEED, FSDP2, EngineChoice, choose_engine
from diffdpo.engine.deepspeed import DeepSpeedEngine, frozen_by_deepspeed
from diffdpo.engine.fsdp2 import Fsdp2Engine, Fsdp2Frozen
from diffdpo.engine.fsdp2_units import ShardedWeights
from diffdpo.engine.operators import missing_operators, needed_operators, prepare_operators
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine, PlainFrozen
from diffdpo.engine.preflight import check_nvme, check_nvme_room, check_values, check_zeropp, hold_nvme
from diffdpo.engine.row_slices import row_slices
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu, kind_of
from diffdpo.settings.engine import EngineSettings


def check_host(choice: EngineChoice) -> None:
    """UserError for what the engine would ask of this host in vain, or not accept; before a model is loaded."""
    check_accelerate(choice.kind)
    if choice.kind == DEEPSPEED:
        check_values(choice.ds_config)
        missing_operators(needed_operators(choice.ds_config))
        check_nvme(choice.ds_config)
        check_zeropp(choice.ds_config, processes=choice.processes, cuda=torch.cuda.is_available())


def make_engine(
    choice: EngineChoice, module: nn.Module, world: World, options: OptimizerOptions, *, say: Callable[[str], None]
) -> Engine:
    """The module under the chosen engine. ``say`` tells the user of what takes minutes."""
    if choice.kind == DEEPSPEED:
        prepare_operators(choice.ds_config, world, say)
        locks = hold_nvme(choice.ds_config, world)
        check_nvme_room(choice.ds_config, module, world)
        return DeepSpeedEngine(module, world, options, choice=choice, locks=locks)
    if choice.kind == FSDP2:
        return Fsdp2Engine(module, world, options, choice=choice)
    return PlainEngine(module, world, options, choice=choice)


def hold_frozen(choice: EngineChoice, module: nn.Module, world: World) -> FrozenModule:
    """A module that is never trained, held as the chosen engine would hold it; no engine need be there before."""
    if choice.kind == DEEPSPEED:
        locks = hold_nvme(choice.ds_config, world)
        check_nvme_room(choice.ds_config, module, world, trains=False)
        return frozen_by_deepspeed(module, world, choice, locks=locks)
    if choice.kind == FSDP2:
        return Fsdp2Frozen(module, world, choice)
    return PlainFrozen(module, world.device, row_slices(choice, world))


def load_device(choice: EngineChoice, world: World) -> str:
    """Where weights are read to: to the host where parameters are sharded, from where they go to the devices."""
    return "cpu" if choice.shards_parameters else str(world.device)


def weight_shards(choice: EngineChoice, world: World) -> ShardedWeights | None:
    """What has a model hold its shards as its weights are read; None where they are read whole."""
    return ShardedWeights(choice, world) if choice.kind == FSDP2 else None


def choice_for(settings: EngineSettings, world: World, *, adapter: bool = False) -> EngineChoice:
    """The engine of a run in these processes, on their device. UserError as of :func:`choose_engine`."""
    able = {"cuda": is_gpu(world.device), "bf16_able": bf16_able(world.device)}
    return choose_engine(settings, processes=world.size, adapter=adapter, **able)


def bf16_able(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 at its full speed."""
    return is_gpu(device) and kind_of(device).has_bf16(device)
