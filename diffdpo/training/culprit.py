"""The step whose loss or gradient was not finite, kept so that ``--replay`` can take it again.

``culprit-step-N.json`` holds the tokens of every rank's micro-batches; noise is a function of seed, epoch and record.
``culprit-step-N/`` beside it holds weights and optimizer as they were before the step, where the run stopped there.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import PairBatch
from data_pipeline.files import write_whole
from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.step.report import StepReport

VERSION = 2
TENSORS = {
    "input_ids_B2T": torch.int64,
    "lengths_B2": torch.int64,
    "prompt_lengths_B2": torch.int64,
    "weight_B2": torch.float32,
}


@dataclass(frozen=True)
class Culprit:
    """``batches``: the micro-batches of each rank."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    batches: list[list[PairBatch]]


def keep_culprit(
    output_dir: Path, step: int, report: StepReport, rate: float, own: Sequence[PairBatch], engine: Engine
) -> Path:
    """Write the file; every rank calls. OSError where the disk fails."""
    ranks = engine.world.all_gather_object([_as_lists(batch) for batch in own])
    path = output_dir / f"culprit-step-{step}.json"
    if engine.world.is_main:
        numbers = {"loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": rate}
        write_whole(path, json.dumps({"version": VERSION, "step": step, **numbers, "ranks": ranks}).encode())
    return path


def keep_state(path: Path, engine: Engine) -> None:
    """Weights and optimizer beside a culprit's file: no engine has taken the step; every rank calls."""
    folder = path.with_suffix("")
    partial = folder.with_name(folder.name + ".partial")
    if engine.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    engine.world.barrier()
    engine.save(partial)
    engine.world.barrier()
    if engine.world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def read_culprit(path: Path) -> Culprit:
    """What ``keep_culprit`` wrote. UserError for anything else."""
    try:
        told = json.loads(path.read_text())
        if told["version"] != VERSION:
            raise ValueError(f"version {told['version']}")
        batches = [[_as_batch(lists) for lists in rank] for rank in told["ranks"]]
        return Culprit(told["step"], told["loss"], told["grad_norm"], told["learning_rate"], batches)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--replay {path} is no culprit-step-N.json of a run, or is damaged ({error!r})") from None


def _as_lists(batch: PairBatch) -> dict[str, Any]:
    told = {name: getattr(batch, name) for name in ("ids", "epoch", "step", "micro", "last_micro", "records")}
    tensors = {name: getattr(batch, name).tolist() for name in TENSORS}
    # answers are checked by tasks alone, which a replay has none of: no meta
    return {**told, **tensors}


def _as_batch(told: dict[str, Any]) -> PairBatch:
    tensors: dict[str, Any] = {name: torch.tensor(told.pop(name), dtype=dtype) for name, dtype in TENSORS.items()}
    names: dict[str, Any] = {name: tuple(told.pop(name)) for name in ("ids", "records")}
    return PairBatch(**tensors, **names, **told)


def each_record(batch: PairBatch) -> list[PairBatch]:
    """A micro-batch of one for every record that is used."""
    alone = []
    for b, name in enumerate(batch.ids):
        if name:
            tensors: dict[str, Any] = {key: getattr(batch, key)[b : b + 1] for key in TENSORS}
            own: dict[str, Any] = {"ids": (name,), "records": batch.records[b : b + 1], "last_micro": True}
            rest = {key: getattr(batch, key) for key in ("epoch", "step", "micro")}
            alone.append(PairBatch(**tensors, **own, **rest))
    return alone
