"""Training state of ZeRO-3 that lies on NVMe: brought to the host part by part, to be saved whole and by name, or to be
put in place.

DeepSpeed cannot go on from its own checkpoint of such state (0.19.8): its reader lets go of the moments' files
(``purge_state``) and copies the saved ones behind buffers that are written over. Here the groups of weights that it
steps one after the other are read as a step reads them, and written as a step writes them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from diffdpo.engine.saved import save_tensors, trained_by_name
from diffdpo.engine.world import World
from diffdpo.engine.zero_fill import MOMENTS, count_of, piece_of, state_of

NUMBERS_A_FILE = 2**27  # 512 MiB in fp32: what a save holds on the host beside a group


@contextmanager
def on_host(optimizer: Any, group: int, *, changed: bool) -> Iterator[torch.Tensor]:
    """A group's fp32 weights, the moments beside them. ``changed``: they go back to the disk."""
    flat, swapped = optimizer.fp32_partitioned_groups_flat[group], optimizer._swappable_optimizer_subgroup(group)
    if not swapped:  # small groups never leave the host
        yield flat
        return
    swapper = optimizer.optimizer_swapper
    swapper.swap_in_optimizer_state(parameter=flat, async_parameter=None)
    try:
        yield flat
    finally:
        if changed:  # at once, also where steps write beside one another: the next group here may be this one
            swapper.swap_out_optimizer_state(parameter=flat, async_swap=False)
        else:
            swapper.release_swap_buffers(parameter=flat)


def write_swapped(folder: Path, engine: Any, module: nn.Module, world: World) -> None:
    """The state by name, in files that any engine reads (``engine.tensor_files``). Every rank calls, rank 0 writes; its
    failure is raised on all as an OSError."""
    failed: OSError | None = None
    for number, tensors in enumerate(_in_files(state_by_name(engine, module, world))):
        if world.is_main and failed is None:
            try:
                save_tensors(tensors, folder / f"state-{number:05}.safetensors")
            except (OSError, SafetensorError) as error:  # the others are in collectives: all go to the end together
                failed = OSError(str(error))
    if (failed := world.broadcast(failed)) is not None:
        raise failed


def state_by_name(engine: Any, module: nn.Module, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """(NAME, fp32 weight), (NAME.exp_avg, ...), (NAME.exp_avg_sq, ...) and (NAME.step, ...), each whole, on the host of
    every rank; every rank iterates."""
    optimizer, base = engine.optimizer, engine.optimizer.optimizer
    names = {id(parameter): name for name, parameter in trained_by_name(module).items()}
    for group, parameters in enumerate(optimizer.fp16_groups):
        with on_host(optimizer, group, changed=False) as flat:
            state = base.state.get(flat, {})  # empty before the first step that was taken
            for parameter in parameters:
                name, piece = names[id(parameter)], piece_of(optimizer, parameter, 3)
                assert piece is not None, "under ZeRO-3 every process has a piece of every weight"
                moments = ((f"{name}.{what}", state[what]) for what in MOMENTS if what in state)
                for key, vector in ((name, flat.data), *moments):
                    part = vector.view(-1)[piece.offset : piece.offset + piece.size]
                    whole = world.all_gather(part.to(world.device)).cpu()
                    yield key, whole[: parameter.ds_numel].view(parameter.ds_shape).clone()
                if "step" in state:
                    yield f"{name}.step", torch.tensor(float(state["step"]))


def fill_swapped(engine: Any, module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put what ``state_by_name`` gave in place, also from another engine or number of processes; in any order, and what
    comes one after the other of a group costs one round to the disk. Every rank calls."""
    optimizer, base, trained = engine.optimizer, engine.optimizer.optimizer, trained_by_name(module)
    optimizer.checkpoint_event_prologue()
    met: set[int] = set()
    group_of = {id(p): group for group, parameters in enumerate(optimizer.fp16_groups) for p in parameters}

    def parameter_of(key: str) -> Any:
        weight, _, what = key.rpartition(".")
        return trained[weight if what in (*MOMENTS, "step") else key]

    for group, some in groupby(tensors, key=lambda item: group_of[id(parameter_of(item[0]))]):
        with on_host(optimizer, group, changed=True) as flat:
            if group not in met and flat in base.state:  # of steps that are given up
                _set_back(base, flat)
            met.add(group)
            for key, whole in some:
                piece, what = piece_of(optimizer, parameter_of(key), 3), key.rpartition(".")[2]
                assert piece is not None, "under ZeRO-3 every process has a piece of every weight"
                if what in (*MOMENTS, "step") and "step" not in base.state.get(flat, {}):
                    state_of(base, flat)
                    _set_back(base, flat)
                if what == "step":
                    base.state[flat]["step"] = count_of(base, float(whole), flat.data)
                else:
                    piece.put(base.state[flat][what] if what in MOMENTS else flat.data, whole)
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:  # whole on every process: let go of what they were
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _set_back(base: torch.optim.Optimizer, flat: torch.Tensor) -> None:
    """AdamW's state as before any step."""
    state = base.state[flat]
    for what in MOMENTS:
        if what in state:
            state[what].zero_()
    if state:
        state["step"] = count_of(base, 0.0, flat.data)


def _in_files(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """As many as a file holds at a time, at least one."""
    some: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if some and sum(map(torch.Tensor.numel, some.values())) + tensor.numel() > NUMBERS_A_FILE:
            yield some
            some = {}
        some[name] = tensor
    if some:
        yield some
