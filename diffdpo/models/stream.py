"""Weights from safetensors shards into an empty model, one shard at a time.

Each shard is mapped, its tensors copied to their dtype and device, and unmapped before the next: beside the finished
weights at most one shard is resident. The copies do not alias the files, so a model in use survives its directory
being overwritten.
"""

import json
import math
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from diffdpo.errors import UserError

NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints store and that are computed here."""


def check_folder(name_or_path: str) -> None:
    """UserError for what can only be a folder's name and is none (so that no hub is asked for it)."""
    looks_local = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).is_dir():
        raise UserError(f"no model at {name_or_path!r}: there is no such folder")


def checkpoint_folder(name_or_path: str) -> Path:
    """The directory itself, or the hub's snapshot of safetensors and JSON files. UserError when neither is there."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    check_folder(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load the weights of {name_or_path!r}: {reason}") from error


def shard_files(folder: Path) -> list[Path]:
    """The shards an index names, else `model.safetensors`."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot load the weights of {str(folder)!r}: {index.name} is damaged ({error})") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(f"cannot load the weights of {str(folder)!r}: {missing[0]} is missing")
    return [folder / name for name in sorted(names)]


def stored_dtype(name_or_path: str) -> str:
    """The dtype of a checkpoint's largest tensor, as `load_model` names it. UserError for one it cannot load."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    path = shard_files(checkpoint_folder(name_or_path))[0]
    try:
        with safe_open(path, framework="pt") as shard:
            slices = [shard.get_slice(name) for name in shard.keys()]  # noqa: SIM118 - not a dict
            found = max(slices, key=lambda part: math.prod(part.get_shape())).get_dtype()
    except (SafetensorError, ValueError) as error:
        raise UserError(f"cannot load the weights of {name_or_path!r}: {path.name}: {error}") from error
    if found not in names:
        raise UserError(f"{name_or_path!r} stores weights as {found}; supported: {', '.join(names)}")
    return names[found]


def stream_weights(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, device: str) -> None:
    """Give every parameter of `model` (on the meta device) its tensor from `folder`.

    Raises UserError for a damaged file and for tensors that are missing, unexpected or of another shape.
    """
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = set()
    for path in shard_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    if name in tied or name.endswith(NOT_WEIGHTS):
                        continue
                    found = tuple(shard.get_slice(name).get_shape())
                    if name not in shapes:
                        raise UserError(
                            f"{str(folder)!r}: unexpected tensor {name}; config.json describes no such part"
                        )
                    if found != shapes[name]:
                        raise UserError(f"{str(folder)!r}: {name} has shape {found}, config.json says {shapes[name]}")
                    _set_parameter(model, name, shard.get_tensor(name).to(device, dtype, copy=True))
                    loaded.add(name)
        except SafetensorError as error:
            raise UserError(f"cannot load the weights of {str(folder)!r}: {path.name}: {error}") from error
    missing = sorted(shapes.keys() - loaded - tied.keys())
    if missing:
        raise UserError(f"{str(folder)!r}: {len(missing)} missing tensors, first {missing[0]}")
    model.tie_weights()


def _set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
