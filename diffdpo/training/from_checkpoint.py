"""The model that a checkpoint holds, whichever engine wrote it: what was trained laid over what it was trained on."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from diffdpo.config import SftConfig, TrainConfig
from diffdpo.engine.choice import PLAIN, EngineChoice
from diffdpo.engine.tensor_files import read_weights
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.setup.model import load_policy
from diffdpo.training.checkpoint import find_checkpoint, read_state

ALONE = World(0, 0, 1, torch.device("cpu"))


def model_of_checkpoint(folder: Path) -> tuple[LoadedModel, str]:
    """(the model in fp32 on the host, an adapter still beside its base; what it was trained on). Weights are read file
    by file and tensor by tensor, so that beside them there is never more than one file's.

    UserError for a folder that is no sound checkpoint, or one that cannot be read by others than who wrote it.
    """
    find_checkpoint(str(folder), folder.parent.parent, ALONE, print)  # every file of it is looked at
    asked: dict[str, Any] = read_state(folder)["config"]
    if "loss_type" in asked:
        config = replace(_settings(TrainConfig, asked), load_in_4bit=False)  # an adapter goes onto original weights
        loaded = load_policy(config, EngineChoice(PLAIN, 1), ALONE)
        base = config.model_name_or_path
    else:
        base = _settings(SftConfig, asked).model_name_or_path
        start = folder.absolute().parent.parent / "start"
        if base is None and not start.is_dir():
            raise UserError(f"--checkpoint {folder}: {start}, the new model its run began with, is not there")
        loaded = load_model(base or str(start))
        loaded.model.requires_grad_(True)
    read_weights(folder, MaskedLogProbs(loaded.model, loaded.spec))
    return loaded, base or "a new model"


def _settings(kind: type, values: dict[str, Any]) -> Any:
    return kind(**{item.name: values[item.name] for item in fields(kind) if values.get(item.name) is not None})
