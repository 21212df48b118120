"""What of a module goes into a checkpoint: its trained weights, by name. What is frozen comes from the base model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from torch import nn

from diffdpo.errors import UserError

SNAPSHOT_SHARE = 0.3  # of the host's free memory that its processes' copies for a checkpoint may take


def fits_beside(size: int) -> bool:
    """Whether this process may copy so many bytes for a checkpoint that is written beside the steps."""
    return size <= SNAPSHOT_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def trained_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Each trained parameter once, however many names it has in the module (tied weights)."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_trained(shapes: Mapping[str, Sequence[int]], module: nn.Module) -> None:
    """UserError unless a checkpoint holds the trained weights of the module, no more and no fewer.

    Its reader cannot see to it: frozen weights are missing on purpose.
    """
    ours = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained_by_name(module).items()}
    for name in sorted(ours.keys() | shapes.keys()):
        if name not in shapes:
            raise UserError(f"the checkpoint has no weight {name}, which is trained here; resume the run that wrote it")
        if name not in ours:
            raise UserError(f"the checkpoint holds {name}, which is not trained here; resume the run that wrote it")
        if tuple(shapes[name]) != ours[name]:
            raise UserError(f"the checkpoint's {name} has shape {tuple(shapes[name])}, ours {ours[name]}")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors as safetensors: numbers only, nothing that could be run when it is read."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
