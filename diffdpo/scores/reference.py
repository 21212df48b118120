"""The frozen reference: where its row scores come from. Dropout is off in every model here."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.engine.clock import Clock
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments

Reference = Callable[[NoisyRows, PairBatch], torch.Tensor]
"""Rows, and the batch they are of → f_R of the reference, without a graph. The rows carry the noise, so policy and
reference share it; the batch says which records they are, for references that look scores up."""


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that is never trained; to be taken before an engine wraps ``module``."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def copy_reference(engine: Engine, module: nn.Module, *, segments: Segments) -> Reference:
    """A second model in memory, held by the engine as it holds the policy."""
    return frozen_reference(engine.freeze(module), segments)


def frozen_reference(forward: Callable[..., torch.Tensor], segments: Segments) -> Reference:
    """A module that an engine holds frozen."""
    return lambda rows, batch: score_rows(forward, rows, segments=segments)


def adapter_off_reference(engine: Engine, peft_model: nn.Module, segments: Segments) -> Reference:
    """The policy with its adapter switched off: no second model."""
    return switched_reference(engine, peft_model.disable_adapter, segments)  # type: ignore[arg-type]


def switched_reference(
    engine: Engine, switched: Callable[[], AbstractContextManager[None]], segments: Segments
) -> Reference:
    """The policy's own module as it computes inside ``switched()``."""

    def score(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
        with switched():
            return score_rows(engine, rows, segments=segments)

    return score


def remembered(reference: Reference, segments: Segments) -> Reference:
    """``reference``, which never changes, asked once for each batch: scores of batches met again are kept, on the CPU.

    For records that come back with the same noise. Scores made in larger segments than now (memory ran out since) are
    made anew: policy and reference must be cut alike, or they differ in their last bits.
    """
    kept: dict[tuple, torch.Tensor] = {}

    def score(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
        key = (batch.epoch, batch.step, batch.micro, batch.ids, *segments.sizes().values())
        if key not in kept:
            kept[key] = reference(rows, batch).cpu()
        return kept[key].to(rows.lengths_R.device)

    return score


def no_reference(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
    """Scores of 0: what a reference-free loss is compared with."""
    return torch.zeros(len(rows), device=rows.lengths_R.device)


def timed_reference(reference: Reference, clock: Clock) -> Reference:
    """The reference with its time counted as the reference's: with the adapter off it calls the policy."""

    def score(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
        with clock.phase("reference"):
            return reference(rows, batch)

    return score
