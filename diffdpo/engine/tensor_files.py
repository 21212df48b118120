"""Training state in safetensors files: numbers only, each process its shards, read by any number of processes.

Written and read by torch.distributed.checkpoint, whose safetensors storage holds no pickle. A weight is called NAME,
its AdamW state NAME.exp_avg, NAME.exp_avg_sq and NAME.step, whichever engine wrote it; so each reads the others' files.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from diffdpo.engine.deepspeed_files import TAG
from diffdpo.engine.fsdp2_units import fill
from diffdpo.engine.optimizer_kinds import make_state, state_tensors, take_counts
from diffdpo.engine.saved import check_trained, trained_by_name
from diffdpo.engine.zero_files import ZeroFiles
from diffdpo.errors import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
OTHERS = ("row_var", "col_var", "variance", "momentum_buffer", "state1", "state2", "absmax1", "absmax2")
"""Of the optimizers of ``--optim`` that are not AdamW."""
AT_A_TIME = 2**26  # numbers that are read at once, or one tensor


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained weights and what AdamW keeps of each, by name."""
    trained = trained_by_name(module)
    tensors = {name: parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        tensors |= {f"{name}.{key}": value for key, value in state_tensors(optimizer, parameter).items()}
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], group: Any = None) -> None:
    """Each process its shards, rank 0 what all have whole. Every rank calls, and talks in ``group`` (by default that of
    all); what fails on one is raised on all."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _first_failure():
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())


def read_training_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, fused: bool) -> None:
    """Put what was saved in place, also by DeepSpeed. ``fused``: whether AdamW counts its steps on the device. Every
    rank calls.

    UserError where the folder holds other weights than those trained here.
    """
    zero = _zero_files(folder)
    saved, trained = zero.shapes if zero else saved_shapes(folder), trained_by_name(module)
    kept = {name for name in saved if name.rpartition(".")[2] in (*MOMENTS, *OTHERS)}
    check_trained({name: shape for name, shape in saved.items() if name not in kept}, module)
    optimizer.state.clear()
    if not isinstance(optimizer, torch.optim.AdamW):
        _read_other(folder, kept, module, optimizer, zero=zero is not None)
        return
    _check_adamw(kept)
    for name, parameter in trained.items():
        if f"{name}.exp_avg" in saved:
            count = torch.zeros((), device=parameter.device if fused else "cpu")
            moments = (torch.zeros_like(parameter).detach() for _ in range(2))
            optimizer.state[parameter].update(zip(MOMENTS, (count, *moments), strict=True))
    tensors = training_state(module, optimizer)
    if zero:
        for name, whole in zero.tensors():
            fill(tensors[name], whole)
        return
    _load(folder, tensors)


def whole_tensors(folder: Path, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor) of the trained weights and AdamW's state in a checkpoint of any engine, some at a time;
    of other engines than DeepSpeed in the module's order.

    UserError where it holds other weights than those trained here, or another optimizer's state.
    """
    zero = _zero_files(folder)
    saved = zero.shapes if zero else saved_shapes(folder)
    kept = {name for name in saved if name.rpartition(".")[2] in (*MOMENTS, *OTHERS)}
    check_trained({name: shape for name, shape in saved.items() if name not in kept}, module)
    _check_adamw(kept)
    if zero:
        yield from zero.tensors()
        return
    place = {name: number for number, name in enumerate(trained_by_name(module))}
    weight = {name: name.rpartition(".")[0] if name in kept else name for name in saved}
    names = sorted(saved, key=lambda name: (place[weight[name]], name), reverse=True)
    while names:
        some: dict[str, torch.Tensor] = {}
        size = 0
        while names and (not some or size < AT_A_TIME):
            name = names.pop()
            some[name] = torch.empty(saved[name], dtype=torch.float32)
            size += some[name].numel()
        _load(folder, some, alone=True)
        yield from some.items()


def _check_adamw(kept: set[str]) -> None:
    """UserError where what was kept of an optimizer is not AdamW's."""
    if foreign := sorted(name for name in kept if name.rpartition(".")[2] not in MOMENTS):
        raise UserError(f"the checkpoint holds {foreign[0]}, of another --optim; resume with that of its run")


def _zero_files(folder: Path) -> ZeroFiles | None:
    """What DeepSpeed wrote; None where another engine did. UserError where it cannot be read by name."""
    if not (folder / TAG).is_dir():
        return None
    try:
        return ZeroFiles(folder / TAG)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}; go on with the run that wrote it") from None


def read_weights(folder: Path, module: nn.Module) -> None:
    """Put the trained weights of a checkpoint of any engine in place, in one process, tensor by tensor.

    UserError where it holds other weights than those trained here, or none that can be read.
    """
    trained = {name: parameter.detach() for name, parameter in trained_by_name(module).items()}
    zero = _zero_files(folder)
    if zero is None:
        of_optimizer = (*MOMENTS, *OTHERS)
        saved = {n: shape for n, shape in saved_shapes(folder).items() if n.rpartition(".")[2] not in of_optimizer}
        check_trained(saved, module)
        _load(folder, dict(trained), alone=True)
        return
    check_trained({name: shape for group in zero.groups for name, shape in group.items()}, module)
    for name, whole in zero.weights():
        trained[name].copy_(whole)


def _read_other(
    folder: Path, kept: set[str], module: nn.Module, optimizer: torch.optim.Optimizer, *, zero: bool
) -> None:
    """The state of an optimizer that is not AdamW, put in place. UserError where the files are of another."""
    if kept:
        make_state(optimizer)
    tensors = training_state(module, optimizer)
    ours = tensors.keys() - trained_by_name(module).keys()
    if zero or kept != ours:
        odd = min(kept ^ ours, default="ZeRO's flat state")
        raise UserError(f"the checkpoint is of another --optim ({odd}); resume with that of its run")
    _load(folder, tensors)
    for name, parameter in trained_by_name(module).items():
        if (count := tensors.get(f"{name}.step")) is not None:
            take_counts(optimizer, parameter, count)


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the folder's files, put together."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}  # type: ignore[union-attr]


def _load(folder: Path, tensors: dict[str, torch.Tensor], *, alone: bool = False) -> None:
    """Fill ``tensors``, together with the other ranks or each process for itself."""
    with _first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(tensors, storage_reader=_reader(folder), no_dist=alone or not dist.is_initialized())


def _reader(folder: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(folder))


@contextmanager
def _first_failure() -> Iterator[None]:
    """The error that one of the ranks met, in place of the wrapper (no ``Exception``) that all are given."""
    try:
        yield
    except dcp.CheckpointException as failure:
        raise next(iter(failure.failures.values()))[0] from None
