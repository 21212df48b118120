"""The model that a training checkpoint holds, read without the engine that wrote it.

A checkpoint holds the trained weights alone. The rest, and whether there is an adapter, the settings in its
``run.json`` say.
"""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from diffdpo.config import SftConfig, TrainConfig
from diffdpo.engine.tensor_files import read_weights
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.setup.model import adapted
from diffdpo.training.checkpoint import NAME, STATE, fault_in, list_checkpoints, read_state, told_if_unreadable
from diffdpo.training.manifest import MANIFEST

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def is_checkpoint(folder: str) -> bool:
    """Whether a folder is a run's ``checkpoints/step-N``."""
    path = Path(folder)
    return bool(NAME.fullmatch(path.resolve().name)) and (path / STATE).is_file()


def is_run(folder: str) -> bool:
    """Whether a folder is a run's ``--output_dir``."""
    path = Path(folder)
    return path.is_dir() and not (path / "config.json").exists() and (path / "metrics.jsonl").is_file()


def models_of_run(folder: str) -> list[tuple[int, str]]:
    """(step, folder) of all that a run has kept: its checkpoints, oldest first, and its final model. UserError where
    it has none."""
    path = Path(folder)
    found = [(int(each.name.split("-")[1]), str(each)) for each in list_checkpoints(path)]
    if (path / "final").is_dir() and (path / "summary.json").is_file():
        summary = json.loads((path / "summary.json").read_text())
        step = summary.get("kept_step", summary["steps"])
        found = sorted([each for each in found if each[0] != step] + [(step, str(path / "final"))])
    if not found:
        raise UserError(
            f"{folder} is the folder of a run without checkpoints or a final model; nothing can be evaluated"
        )
    return found


def checkpoint_digest(folder: str) -> str:
    """What tells a checkpoint from others: its manifest, which has a sum of every file."""
    return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()[:16]


def base_of_checkpoint(folder: str) -> str:
    """The model that its run began with: folder or name."""
    settings = _settings(folder)
    start = Path(folder).resolve().parents[1] / "start"  # where supervised training keeps the new model it began with
    if isinstance(settings, SftConfig) and not settings.policy:
        return str(start)
    return model_or_bundled(settings.policy)


def block_size_of_checkpoint(folder: str) -> int | None:
    """Tokens of a block, where its run was told."""
    return _settings(folder).block_size


def load_checkpoint(folder: str, **options: Any) -> LoadedModel:
    """The model at that step; ``options`` are those of ``load_model``. UserError where its files cannot be read
    alone, or are damaged: every one is looked at."""
    if fault := fault_in(Path(folder), ALONE):
        raise UserError(f"{folder} cannot be used: {fault}; take another checkpoint")
    settings = _settings(folder)
    loaded = adapted(load_model(base_of_checkpoint(folder), block_size=settings.block_size, **options), settings)
    with told_if_unreadable(Path(folder)), torch.no_grad():
        read_weights(Path(folder), MaskedLogProbs(loaded.model, loaded.spec))
    return replace(loaded, model=loaded.model.requires_grad_(False).eval())


def _settings(folder: str) -> TrainConfig | SftConfig:
    given = read_state(Path(folder))["config"]
    kind = TrainConfig if "beta" in given else SftConfig
    known = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in known})
