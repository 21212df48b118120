"""What a --ds_config asks of the host, looked at before a model is loaded."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from diffdpo.errors import UserError

IN_MEMORY = ("tmpfs", "ramfs")


def check_swap_folders(ds_config: Mapping[str, Any]) -> None:
    """UserError unless what goes to NVMe has a folder there that can be written."""
    for part in ("offload_optimizer", "offload_param"):
        settings = ds_config.get("zero_optimization", {}).get(part, {})
        if settings.get("device") == "nvme":
            fault = _fault_of(settings.get("nvme_path"))
            if fault:
                raise UserError(
                    f'--ds_config: "nvme_path" of {part} {fault}; set it to an existing folder on an NVMe disk '
                    "(launch/plan.py says how much it needs)"
                )


def _fault_of(path: Any) -> str:
    """What is wrong with it; '' when nothing is."""
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
