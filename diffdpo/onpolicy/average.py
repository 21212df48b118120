"""A moving average of models' weights, as a model folder."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffdpo.models.checkpoint.weights import checkpoint_folder, shard_files
from diffdpo.training.manifest import publish, sync_tree


def write_average(so_far: str, new: Path, out: Path, *, decay: float) -> None:
    """``out`` = decay · so_far + (1 - decay) · new, tensor by tensor in fp32, in the dtypes and files of ``new``; it
    appears whole or not at all. Both are model folders (or ``so_far`` a hub name) of one layout."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(new, partial, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    before: dict[str, Path] = {}
    for path in shard_files(checkpoint_folder(so_far)):
        with safe_open(path, framework="pt") as shard:
            before |= dict.fromkeys(shard.keys(), path)
    for path in shard_files(new):
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
            mixed = {name: _mixed(before[name], shard.get_tensor(name), name, decay) for name in names}
            save_file(mixed, partial / path.name, metadata=shard.metadata())
    sync_tree(partial)
    publish(partial, out)


def _mixed(path: Path, new: torch.Tensor, name: str, decay: float) -> torch.Tensor:
    with safe_open(path, framework="pt") as shard:
        old = shard.get_tensor(name)
    return (decay * old.float() + (1 - decay) * new.float()).to(new.dtype).contiguous()
