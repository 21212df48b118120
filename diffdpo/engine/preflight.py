"""What a --ds_config says and what it asks of the host, looked at before a model is loaded."""

import copy
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import psutil
from torch import nn

from diffdpo.engine.deepspeed import import_deepspeed
from diffdpo.engine.world import World
from diffdpo.errors import UserError

IN_MEMORY = ("tmpfs", "ramfs")
NVME_LOCK = "diffdpo.lock"
QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_values(config: Mapping[str, Any]) -> None:
    """UserError for what DeepSpeed does not accept in a configuration that ``complete_ds_config`` gave."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    batch = "train_batch_size"  # follows from the rest, and is judged by a world size that is not known yet
    try:
        DeepSpeedConfig({key: copy.deepcopy(value) for key, value in config.items() if key != batch})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"--ds_config: {where} is {first['input']!r}: {first['msg']}; mend it") from error
    except Exception as error:  # DeepSpeed refuses with errors of many kinds
        raise UserError(f"--ds_config: DeepSpeed does not accept it: {' '.join(str(error).split())[:300]}") from error


def check_nvme(ds_config: Mapping[str, Any]) -> None:
    """UserError unless what goes to NVMe has a folder there that can be written, and a library to write with."""
    zero = ds_config.get("zero_optimization", {})
    parts = [part for part in ("offload_optimizer", "offload_param") if zero.get(part, {}).get("device") == "nvme"]
    for part in parts:
        fault = nvme_fault(zero[part].get("nvme_path"))
        if fault:
            raise UserError(
                f'--ds_config: "nvme_path" of {part} {fault}; set it to an existing folder on an NVMe disk '
                "(launch/plan.py says how much it needs)"
            )
    if parts and not libaio_found():
        raise UserError("DeepSpeed reads and writes NVMe through libaio and does not find it; install libaio-dev")


_held: WeakValueDictionary[Path, IO[str]] = WeakValueDictionary()  # folders that this process has locked


def hold_nvme(ds_config: Mapping[str, Any], world: World) -> list[IO[str]]:
    """Locks on the folders that state goes to, held until nobody keeps them or the process ends; every process calls,
    before anything touches the folders.

    UserError, on all of them, where another run holds one: DeepSpeed names its files by rank and parameter alone, so
    two runs with one folder would compute with each other's numbers.
    """
    held, fault = list[IO[str]](), ""
    for folder in sorted(set(_folders(ds_config).values())) if world.local_rank == 0 else ():
        try:
            known = _held.get(folder)
            held.append(known if known is not None and not known.closed else _locked(folder))
        except UserError as error:
            fault = str(error)
    if faults := [each for each in world.all_gather_object(fault) if each]:
        raise UserError(faults[0])
    return held


def _folders(ds_config: Mapping[str, Any]) -> dict[str, Path]:
    """Where what is on NVMe lies, by part."""
    zero = ds_config.get("zero_optimization", {})
    parts = {part: zero.get(part) or {} for part in ("offload_optimizer", "offload_param")}
    return {part: Path(given["nvme_path"]).resolve() for part, given in parts.items() if given.get("device") == "nvme"}


def _locked(folder: Path) -> IO[str]:
    path = folder / NVME_LOCK
    try:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f'--ds_config: "nvme_path" is {folder}, where another run keeps its state; give each run a folder'
        ) from None
    except OSError as error:
        raise UserError(
            f'--ds_config: "nvme_path" is {folder}, and {NVME_LOCK} there cannot be written ({error.strerror}); give '
            "another folder"
        ) from None
    _held[folder] = file
    return file


def check_nvme_room(ds_config: Mapping[str, Any], module: nn.Module, world: World, *, trains: bool = True) -> None:
    """UserError, on all processes, where a disk has less room than the state that goes to it; every process calls.

    Trained parameters take 16 bytes each there (weights, moments and gradients in fp32), with their parameters on disk
    all take their own width. What DeepSpeed has left there by an earlier run is written over. Without ``trains`` the
    module has weights alone.
    """
    width = 2 if ds_config.get("bf16", {}).get("enabled") else 4
    sizes = {
        "offload_optimizer": sum(16 * p.numel() for p in module.parameters() if p.requires_grad and trains),
        "offload_param": sum(width * p.numel() for p in module.parameters()),
    }
    folders = _folders(ds_config)
    if not folders:
        return
    hosts = world.all_gather_object(socket.gethostname())
    here, fault = hosts.count(socket.gethostname()) / world.size, ""
    disks: dict[int, set[Path]] = {}
    for folder in folders.values():
        disks.setdefault(folder.stat().st_dev, set()).add(folder)
    for on_disk in disks.values():
        size = here * sum(sizes[part] for part, folder in folders.items() if folder in on_disk)
        room = shutil.disk_usage(next(iter(on_disk))).free + sum(map(_left_behind, on_disk))
        if size > room:
            names = " and ".join(map(str, sorted(on_disk)))
            fault = (
                f'--ds_config: "nvme_path" is {names} with {room / 1e9:.1f} GB of room, and the state that goes there '
                f"takes {size / 1e9:.1f} GB; make room or name another disk"
            )
    if faults := [each for each in world.all_gather_object(fault) if each]:
        raise UserError(faults[0])


def _left_behind(folder: Path) -> int:
    """Bytes that DeepSpeed has left in a folder of state."""
    ours = (path for name in ("zero_stage_3", "reference/zero_stage_3") for path in (folder / name).rglob("*"))
    return sum(path.stat().st_size for path in ours if path.is_file())


def check_recomputed(ds_config: Mapping[str, Any]) -> None:
    """UserError for weights on NVMe in a run that computes layers again in the backward."""
    if (obstacle := recomputing_obstacle(ds_config)) is not None:
        raise UserError(
            f"--ds_config has offload_param on NVMe: {obstacle}; leave out --gradient_checkpointing and --segmentation "
            'checkpoint (smaller segments, --segment_rows, take less memory too), or give offload_param the "device": '
            '"cpu"'
        )


def recomputing_obstacle(ds_config: Mapping[str, Any]) -> str | None:
    """What stands against computing layers again in the backward, for the user; None if nothing.

    DeepSpeed 0.19.8 looks ahead for weights to be read and meets those of a recomputed layer twice, which it asserts
    never happens. With its looking ahead switched off (stage3_prefetch_bucket_size 0) one process on a CPU took a wrong
    gradient without a word: what the recomputation saves is the buffer that the weight was read into, and another
    weight is read into it before the gradient is taken (benchmarks/streamed.py).
    """
    if (ds_config.get("zero_optimization", {}).get("offload_param") or {}).get("device") != "nvme":
        return None
    return "DeepSpeed cannot compute layers again from weights that it reads for every pass"


def check_zeropp(ds_config: Mapping[str, Any], *, processes: int, cuda: bool) -> None:
    """UserError for what ZeRO++ cannot do here: quantise without a GPU, or split the processes into unequal groups."""
    zero = ds_config.get("zero_optimization", {})
    quantised = [key for key in QUANTISED if zero.get(key)]
    if quantised and not cuda:
        raise UserError(
            f"--ds_config sets {' and '.join(quantised)}, for which DeepSpeed has operators for GPUs only, and there "
            "is no GPU; set them to false"
        )
    group = zero.get("zero_hpz_partition_size", 1)
    if isinstance(group, int) and group > 1 and processes % min(group, processes):
        raise UserError(
            f"--ds_config sets zero_hpz_partition_size to {group} and the run has {processes} processes; set it to "
            "the processes of one host"
        )


def libaio_found() -> bool:
    """Whether DeepSpeed's operator for it could be compiled here."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


def nvme_fault(path: Any) -> str:
    """What is wrong with a folder for state on NVMe, for the user; '' when nothing is."""
    if not isinstance(path, str):
        return "is missing" if path is None else f"is {path!r}"
    folder = Path(path)
    if not folder.is_dir():
        return f"is {path}, which is not a folder"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"is {path}, where nothing can be written ({error.strerror})"
    kind = _file_system(folder.resolve())
    return f"is {path}, which lies in memory ({kind})" if kind in IN_MEMORY else ""


def _file_system(folder: Path) -> str:
    """Its type, of the mount that holds the folder; '' where the system does not say."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    holding = [mount for mount in mounts if mount == folder or mount in folder.parents]
    return mounts[max(holding, key=lambda mount: len(os.fspath(mount)))] if holding else ""
