"""The model, and the reference if there is one, that a file of pairs is scored under."""

from collections.abc import Sequence

import torch

from diffdpo.config import ScoreConfig
from diffdpo.errors import UserError
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_model, load_tokenizer_and_spec


def model_names(config: ScoreConfig) -> list[str]:
    """The model, and the reference if one is named."""
    named = model_or_bundled(config.model_name_or_path), config.ref_model_name_or_path
    return [name for name in named if name]


def check_models(names: Sequence[str], *, block_size: int | None = None) -> None:
    """UserError for a model without config or tokenizer, and for two of different vocabularies: no weights are read."""
    vocabularies = [load_tokenizer_and_spec(name, block_size=block_size)[0].get_vocab() for name in names]
    if vocabularies[0] != vocabularies[-1]:
        raise UserError("--ref_model_name_or_path has another vocabulary than the model; their scores do not compare")


def load_models(names: Sequence[str], config: ScoreConfig) -> list[LoadedModel]:
    """The models on ``--device``. UserError where that is not here."""
    device = device_named(config.device)
    return [load_model(name, dtype=config.dtype, device=device, block_size=config.block_size) for name in names]


def device_named(name: str) -> str:
    """``--device``: auto is a GPU where there is one. UserError for a GPU where there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU is to be found here; use --device cpu")
    return name
