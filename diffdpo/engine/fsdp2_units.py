"""What FSDP2 gathers at a time, and how a checkpoint's weights reach their shards without being whole anywhere.

A unit is the embedding, a block, the last norm or the head. Each is gathered by its own call, so whoever calls the
native model's parts (the scorer, the sampler) needs no wrapper, and at most two units are whole at a time. A head that
is the embedding reads the matrix inside a call of the embedding: two units cannot hold one weight.

A shard is a run of rows of its weight (of its first dimension), as ``torch.chunk`` cuts them.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.backbone import MaskedLM


def cut_units(
    model: MaskedLM, choice: EngineChoice, world: World, *, whole: Collection[nn.Parameter] = ()
) -> list[nn.Module]:
    """Cut the weights of a native model into shards, in place; the units. ``whole``: weights that stay as they are."""
    model.computes_on = world.device
    tied = model.head.weight is model.embed.weight
    units = [model.embed, *model.blocks, model.final_norm, *([] if tied else [model.head])]
    if tied:
        _read_inside(model.embed, model.head)
    for unit in units:
        fully_shard(unit, ignored_params=set(whole), **_options(choice, world))
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # losses are sums: so are gradients
        unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no other
    if tied:
        model.head.weight = model.embed.weight
    return units


def is_cut(model: MaskedLM) -> bool:
    """Whether its weights are in shards."""
    return isinstance(model.embed.weight, DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its shard, or all of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The whole tensor on a device that the processes can meet on; every process calls."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(device)
    own = tensor.to_local().detach().to(device)
    again = DTensor.from_local(own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return again.full_tensor()


def fill(tensor: torch.Tensor, stored: Any) -> None:
    """Copy a whole tensor, or one in a safetensors file, into one of ours: into a shard its own rows."""
    with torch.no_grad():
        own_part(tensor).copy_(stored[_rows(tensor)] if isinstance(tensor, DTensor) else stored)


class ShardedWeights:
    """Has a model read from a checkpoint hold its shards from the start; see `diffdpo.models.checkpoint.weights`."""

    def __init__(self, choice: EngineChoice, world: World):
        self.choice, self.world = choice, world

    def cut(self, model: MaskedLM) -> None:
        """Give an empty model its shards, without numbers, where they will stay."""
        home = "cpu" if self.choice.sharding.parameters_on == "cpu" else self.world.device
        units = cut_units(model, self.choice, self.world)
        for unit in units:
            unit.to_empty(device=home)  # type: ignore[arg-type]
        if model.head not in units:
            model.head.weight = model.embed.weight  # which ``to_empty`` has replaced

    def fill(self, parameter: nn.Parameter, stored: Any) -> None:
        """Read this process's rows of a tensor in a safetensors file."""
        fill(parameter, stored)

    def holds(self, parameter: nn.Parameter, stored: Any) -> bool:
        """Whether this process's rows are those of a tensor in a safetensors file."""
        own = own_part(parameter)
        return torch.equal(own, stored[_rows(parameter)].to(own.device, own.dtype))


def _rows(parameter: torch.Tensor) -> slice:
    """This process's, of a weight in shards."""
    assert isinstance(parameter, DTensor)
    total, mesh = parameter.shape[0], parameter.device_mesh
    pieces, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    size = -(-total // pieces)
    rows = slice(min(index * size, total), min((index + 1) * size, total))
    assert own_part(parameter).shape[0] == rows.stop - rows.start
    return rows


def _options(choice: EngineChoice, world: World) -> dict[str, Any]:
    half = torch.bfloat16 if choice.bf16 else None
    offload = CPUOffloadPolicy(pin_memory=is_gpu(world.device))
    return {
        "mesh": _mesh(choice, world),
        "reshard_after_forward": choice.reshard_after_forward,
        # inputs are left alone: the tables of rotary positions are meant to be fp32
        "mp_policy": MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False),
        "offload_policy": offload if choice.sharding.parameters_on == "cpu" else OffloadPolicy(),
    }


def _mesh(choice: EngineChoice, world: World) -> DeviceMesh:
    if not dist.is_initialized():  # one process, which nobody else needed a group for
        dist.init_process_group("nccl" if is_gpu(world.device) else "gloo")
    return _mesh_of(dist.group.WORLD, world.device.type, choice.processes, choice.sharding.over)


@lru_cache(maxsize=1)
def _mesh_of(group: Any, kind: str, processes: int, over: int) -> DeviceMesh:
    """The processes as copies x shards; made once a process group, as it makes groups of its own."""
    if over == processes:
        return init_device_mesh(kind, (processes,), mesh_dim_names=("fsdp",))  # peft knows it by the name
    return init_device_mesh(kind, (processes // over, over), mesh_dim_names=("copy", "shard"))


def _read_inside(embed: nn.Module, head: nn.Module) -> None:
    """Have a head that is the embedding's matrix run inside a call of the embedding, where the matrix is whole."""
    look_up, to_logits = embed.forward, head.forward

    def forward(*args: Any, as_head: bool = False, **kwargs: Any) -> torch.Tensor:
        if not as_head:
            return look_up(*args, **kwargs)
        shard, head.weight = head.weight, embed.weight
        try:
            return to_logits(*args, **kwargs)
        finally:
            head.weight = shard

    embed.forward = forward  # type: ignore[method-assign]
    head.forward = lambda *args, **kwargs: embed(*args, as_head=True, **kwargs)  # type: ignore[method-assign]
