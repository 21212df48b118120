"""The model, and the reference if there is one, that a file of pairs is scored under."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffdpo.config import ScoreConfig
from diffdpo.engine.make import bf16_able
from diffdpo.errors import UserError
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, dtype_name, load_model, load_tokenizer_and_spec, load_with_adapter


def model_names(config: ScoreConfig) -> list[str]:
    """The model (its adapter's folder, where one is put on it), and the reference if one is named."""
    policy = config.adapter_name_or_path or model_or_bundled(config.model_name_or_path)
    named = policy, config.ref_model_name_or_path
    return [name for name in named if name]


def check_models(names: Sequence[str], *, block_size: int | None = None) -> None:
    """UserError for a model without config or tokenizer, and for two of different vocabularies: no weights are read."""
    vocabularies = [load_tokenizer_and_spec(name, block_size=block_size)[0].get_vocab() for name in names]
    if vocabularies[0] != vocabularies[-1]:
        raise UserError("--ref_model_name_or_path has another vocabulary than the model; their scores do not compare")


def load_models(names: Sequence[str], config: ScoreConfig) -> list[LoadedModel]:
    """The models on ``--device``. UserError where that is not here."""
    config = settled(config)
    how: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "load_in_4bit": config.load_in_4bit}
    how["block_size"] = config.block_size
    if config.adapter_name_or_path:
        policy = load_with_adapter(config.model_name_or_path, config.adapter_name_or_path, **how)
        return [policy, *(load_model(name, **how) for name in names[1:])]
    return [load_model(name, **how) for name in names]


def settled(config: ScoreConfig, given: Sequence[LoadedModel] = ()) -> ScoreConfig:
    """The settings with the device and dtype that ``auto`` stands for: those of the models in memory where there are
    ``given`` ones. UserError for a device that is not here, and for models that do not go together."""
    device = device_beside(config.device, given)
    if config.dtype == "auto" and given:
        return replace(config, device=device, dtype=given[0].dtype)
    return replace(config, device=device, dtype=dtype_named(config.dtype, device))


def dtype_named(name: str, device: str) -> str:
    """``--dtype``: auto is bfloat16 where a GPU has it; an 8B model in float32 takes 32 GB."""
    return dtype_name(bf16_able(torch.device(device))) if name == "auto" else name


def device_beside(name: str, given: Sequence[LoadedModel]) -> str:
    """``--device`` where models are in memory: theirs. UserError where they are on several, or another is asked for."""
    if not given:
        return device_named(name)
    theirs = sorted({str(each.device) for each in given})
    if len(theirs) > 1:
        raise UserError(f"the models in memory are on {' and '.join(theirs)}; load them on one device")
    if name not in ("auto", theirs[0], torch.device(theirs[0]).type):  # cuda is any GPU
        raise UserError(
            f"device is {name} and the model in memory is on {theirs[0]}; leave device out, or load it there"
        )
    return theirs[0]


def device_named(name: str) -> str:
    """``--device``: auto is a GPU where there is one. UserError for a GPU where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU is to be found here; use --device cpu")
    return name
