"""What of a process's memory is weights, gradients and the optimizer's state, whatever engine holds them: counted on
the tensors that are there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import Engine
from diffdpo.engine.fsdp2_units import own_part

WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER = PARTS = ("weights", "reference", "gradients", "optimizer")
DEVICE, HOST = "device", "host"
OF_GRADIENTS = ("grad", "ipg")  # in the names of DeepSpeed's buffers


def held_bytes(engine: Engine, reference: nn.Module | None) -> dict[tuple[str, str], int]:
    """Bytes now by place (the device, beside a GPU the host) and part, each storage once: where a tensor is two things,
    it is the first of ``PARTS``."""
    found: dict[str, list[torch.Tensor]] = {
        WEIGHTS: list(_of_module(engine.module)),
        REFERENCE: list(_of_module(reference)) if reference is not None else [],
        GRADIENTS: [p.grad for p in engine.module.parameters() if p.grad is not None],
        OPTIMIZER: [],
    }
    for name, tensor in _reached(engine.optimizer):
        found[GRADIENTS if any(word in name for word in OF_GRADIENTS) else OPTIMIZER].append(tensor)
        if tensor.grad is not None:
            found[GRADIENTS].append(tensor.grad)
    sizes: dict[tuple[str, str], int] = {}
    counted: set[tuple[str, int]] = set()
    for part, tensors in found.items():
        for tensor in tensors:
            storage = own_part(tensor).untyped_storage()
            place = (storage.device.type, storage.data_ptr())
            if storage.nbytes() and place not in counted and storage.device.type != "meta":
                counted.add(place)
                where = DEVICE if storage.device.type == engine.world.device.type else HOST
                sizes[where, part] = sizes.get((where, part), 0) + storage.nbytes()
    return sizes


def _of_module(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor
        if (shard := getattr(tensor, "ds_tensor", None)) is not None:  # ZeRO-3's
            yield shard


def _reached(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name of the attribute, tensor) of all that an optimizer, torch's or DeepSpeed's, keeps; modules are left out."""
    waiting, seen = [("", optimizer)], set()
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            waiting += [(name, item) for item in (*value, *value.values())]
        elif isinstance(value, list | tuple | set):
            waiting += [(name, item) for item in value]
        elif isinstance(value, torch.optim.Optimizer) or type(value).__module__.startswith("deepspeed."):
            waiting += [(name if name else key, item) for key, item in getattr(value, "__dict__", {}).items()]
