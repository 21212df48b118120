"""Weights from safetensors shards into an empty model, one shard at a time.

Each shard is mapped, its tensors copied to their dtype and device, and unmapped before the next: beside the finished
weights at most one shard is resident. The copies do not alias the files, so a model in use survives its directory
being overwritten.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import data_pipeline.hub
from data_pipeline.errors import DataError
from data_pipeline.hub import split_revision
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.nf4 import expect_nf4, is_nf4, quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes of safetensors that are plain weights. (8-bit ones need scales that this layout does not have.)"""
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints store and that are computed here."""


class Shards(Protocol):
    """Weights of which each process holds a part. ``stored``: a tensor in a safetensors file, read as it is sliced."""

    def cut(self, model: Any) -> None:
        """Give an empty model its parts, without numbers, where they will stay."""
        ...

    def fill(self, parameter: nn.Parameter, stored: Any) -> None:
        """Read a parameter's own part."""
        ...

    def holds(self, parameter: nn.Parameter, stored: Any) -> bool:
        """Whether a parameter's own part is what is stored."""
        ...


def only_kept(name_or_path: str) -> bool:
    """Whether a checkpoint is read from this machine alone (``data_pipeline.hub``). UserError when it is nowhere."""
    try:
        return data_pipeline.hub.only_kept(name_or_path)
    except DataError as error:
        raise UserError(str(error)) from error


def checkpoint_folder(name_or_path: str) -> Path:
    """The directory itself, or the hub's snapshot of safetensors and JSON files. UserError when neither is there."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    kept = only_kept(name_or_path)
    name, revision = split_revision(name_or_path)
    try:
        files = ["*.safetensors", "*.json"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=kept))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load the weights of {name_or_path!r}: {reason}") from error


def shard_files(folder: Path) -> list[Path]:
    """The shards an index names, else `model.safetensors`. UserError where there is neither, or both."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file() and single.is_file():
        raise _unreadable(folder, f"it holds both {single.name} and {INDEX}; remove the one that is out of date")
    names = set(_weight_map(folder).values()) if index.is_file() else {single.name}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing and not index.is_file():
        shards, pickles = (sorted(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
        hint = f"; {shards[0].name} needs its {INDEX}" if shards else ""
        hint = hint or (f"; {pickles[0].name} must be converted to safetensors" if pickles else "")
        raise _unreadable(folder, f"{missing[0]} is missing{hint}")
    if missing:
        raise _unreadable(folder, f"{missing[0]} is missing")
    return [folder / name for name in sorted(names)]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, as the index says; empty where there is none."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        found = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, f"{INDEX} is damaged ({error})") from error
    odd = [name for name in found.values() if not isinstance(name, str) or Path(name).name != name]
    if odd:
        raise _unreadable(folder, f"{INDEX} is damaged ({odd[0]!r} is no file of this folder)")
    return found


def _unreadable(folder: Path | str, reason: str) -> UserError:
    return UserError(f"cannot load the weights of {str(folder)!r}: {reason}")


def stored_dtype(name_or_path: str) -> str:
    """The dtype of a checkpoint's largest tensor, as `load_model` names it. UserError for one it cannot load."""
    path = shard_files(checkpoint_folder(name_or_path))[0]
    try:
        with safe_open(path, framework="pt") as shard:
            slices = [shard.get_slice(name) for name in shard.keys()]  # noqa: SIM118 - not a dict
            found = max(slices, key=lambda part: math.prod(part.get_shape())).get_dtype()
    except (SafetensorError, ValueError) as error:
        raise _unreadable(name_or_path, f"{path.name}: {error}") from error
    if found not in STORED:
        raise UserError(f"{name_or_path!r} stores weights as {found}; supported: {', '.join(STORED)}")
    return STORED[found]


def read_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    name_or_path: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    nf4: bool = False,
    shards: Shards | None = None,
) -> Any:
    """A model of this class in eval mode, with the weights of a directory or hub id. See `stream_weights`."""
    folder = checkpoint_folder(name_or_path)
    config.dtype = dtype
    with torch.device("meta"):
        model: Any = model_class(config)
    if nf4:
        expect_nf4(model, dtype)
    if shards is not None:
        shards.cut(model.to(dtype))
    stream_weights(model, folder, dtype=dtype, device=device, shards=shards)
    # what is saved names the repository: neither peft nor transformers reads NAME@REVISION
    model.name_or_path = config.name_or_path = split_revision(name_or_path)[0]
    return model.eval()


def stream_weights(
    model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, device: str, shards: Shards | None = None
) -> None:
    """Give every parameter of `model` (on the meta device, or cut by `shards`) its tensor from `folder`.

    Raises UserError for a damaged file, for an index that contradicts its shards, and for tensors that are missing,
    unexpected, there twice, of another shape or no floating point numbers.
    """
    tied = model.all_tied_weights_keys
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    place: dict[str, Path] = {}
    for path in shard_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    if name in place:
                        raise UserError(f"{str(folder)!r}: {name} is in {place[name].name} and in {path.name}")
                    place[name] = path
                    if name.endswith(NOT_WEIGHTS):
                        continue
                    _check(shard.get_slice(name), name, shapes.get(name), folder)
                    if name in tied:
                        continue
                    if shards is not None:
                        shards.fill(model.get_parameter(name), shard.get_slice(name))
                    else:
                        set_parameter(model, name, shard.get_tensor(name).to(device, dtype, copy=True))
        except SafetensorError as error:
            raise _unreadable(folder, f"{path.name}: {error}") from error
    missing = sorted(shapes.keys() - place.keys() - tied.keys())
    if missing:
        raise UserError(f"{str(folder)!r}: {len(missing)} missing tensors, first {missing[0]}")
    for name, shard_name in _weight_map(folder).items():
        if name not in place or place[name].name != shard_name:
            raise _unreadable(folder, f"{INDEX} looks for {name} in {shard_name}, which does not have it")
    model.tie_weights()
    for name in tied.keys() & place.keys():
        _check_tied(model, name, place[name], shards)


def _check(stored, name: str, shape: tuple[int, ...] | None, folder: Path) -> None:
    found = tuple(stored.get_shape())
    if shape is None:
        raise UserError(f"{str(folder)!r}: unexpected tensor {name}; config.json describes no such part")
    if found != shape:
        raise UserError(f"{str(folder)!r}: {name} has shape {found}, config.json says {shape}")
    if stored.get_dtype() not in STORED:
        kinds = ", ".join(STORED)
        raise UserError(f"{str(folder)!r} stores {name} as {stored.get_dtype()}; supported: {kinds}")


def _check_tied(model: PreTrainedModel, name: str, path: Path, shards: Shards | None) -> None:
    """A tensor that config.json says is another one must hold the same numbers where it is stored all the same."""
    parameter = model.get_parameter(name)
    with safe_open(path, framework="pt") as shard:
        if shards is not None:
            same = shards.holds(parameter, shard.get_slice(name))
        else:
            same = torch.equal(shard.get_tensor(name).to(parameter.device, parameter.dtype), parameter)
    if not same:
        raise UserError(f"{str(path.parent)!r}: config.json says that {name} is tied, but other numbers are stored")


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter, quantised where 4-bit weights are expected."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    expected = getattr(owner, attribute)
    setattr(owner, attribute, quantised(expected, tensor) if is_nf4(expected) else nn.Parameter(tensor))
