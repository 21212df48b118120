"""Segmentation: how the rows of a micro-batch share memory on their way to one gradient.

A segment is a fixed number of rows run in one forward. Every strategy gives the gradient of one graph over all rows:

===========  ============================================  ==================  ====================
strategy     how                                           cost (full / LoRA)  memory above weights
===========  ============================================  ==================  ====================
none         one graph                                     3F / 2F             all rows
checkpoint   a non-reentrant checkpoint round each         4F / 3F             one segment
             segment, one backward
two_pass     no graph: dL/df of every row; then forward    4F / 3F             one segment
             and backward of each segment
===========  ============================================  ==================  ====================

The number of forwards and backwards depends on the number of rows alone, so ranks stay in step.

Shape suffixes: R rows, A answers.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint as recompute

from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import row_scores

LossOf = Callable[[torch.Tensor], torch.Tensor]
"""Row scores f_R of the policy → the micro-batch's share of the loss, a scalar."""


class Backward(Protocol):
    """A strategy: add the gradient of ``loss_of`` at ``rows`` to the engine; return f_R, detached."""

    def __call__(
        self, engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segment_rows: int, last: bool
    ) -> torch.Tensor: ...


def forward_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows) -> torch.Tensor:
    """f_R of all rows in one forward of the module."""
    logp_M = forward(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)
    return row_scores(logp_M, rows)


def segments_of(rows: NoisyRows, segment_rows: int) -> list[NoisyRows]:
    """The rows in pieces of ``segment_rows`` (0: one piece)."""
    size = segment_rows or len(rows)
    return [rows.segment(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


@torch.no_grad()
def score_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows, *, segment_rows: int) -> torch.Tensor:
    """f_R without a graph, segment by segment."""
    return torch.cat([forward_rows(forward, segment) for segment in segments_of(rows, segment_rows)])


def none(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segment_rows: int, last: bool) -> torch.Tensor:
    """One graph over all rows; ``segment_rows`` is not used."""
    f_R = forward_rows(engine, rows)
    engine.backward(loss_of(f_R), last=last)
    return f_R.detach()


def checkpoint(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segment_rows: int, last: bool) -> torch.Tensor:
    """Each segment recomputed in the backward of one graph: every gradient is reduced (and offloaded) once."""

    def run(segment: NoisyRows) -> torch.Tensor:
        # no randomness inside (dropout is off), hence no generator state to restore; and no check of recomputed
        # tensors, which ZeRO-3's release of frozen weights would trip
        return recompute(
            forward_rows, engine, segment, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )

    f_R = torch.cat([run(segment) for segment in segments_of(rows, segment_rows)])
    engine.backward(loss_of(f_R), last=last)
    return f_R.detach()


def two_pass(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segment_rows: int, last: bool) -> torch.Tensor:
    """Scores first, then gradients: nothing but the weights outlives a segment, and no module is used twice."""
    f_R = score_rows(engine, rows, segment_rows=segment_rows)
    replay(engine, rows, gradient_of(loss_of, f_R), segment_rows=segment_rows, last=last)
    return f_R


def gradient_of(loss_of: LossOf, f_R: torch.Tensor) -> torch.Tensor:
    """dL/df of every row: all that the second pass needs to know of the loss."""
    with torch.enable_grad():
        leaf_R = f_R.detach().requires_grad_()
        return torch.autograd.grad(loss_of(leaf_R), leaf_R)[0]


def replay(engine: Engine, rows: NoisyRows, gradient_R: torch.Tensor, *, segment_rows: int, last: bool) -> None:
    """Second pass: add Σ_R dL/df · ∇f, one forward and one backward a segment."""
    pieces = segments_of(rows, segment_rows)
    for index, (segment, piece_R) in enumerate(zip(pieces, gradient_R.split(segment_rows or len(rows)), strict=True)):
        loss = (forward_rows(engine, segment) * piece_R).sum()
        engine.backward(loss, last=last and index == len(pieces) - 1)


STRATEGIES: dict[str, Backward] = {"none": none, "checkpoint": checkpoint, "two_pass": two_pass}


def check_segmentation(name: str, *, whole_batch: bool) -> None:
    """UserError for a strategy that cannot serve the loss; what :func:`choose_strategy` would find out later."""
    if whole_batch and name not in ("auto", "two_pass"):
        raise UserError(
            f"--segmentation {name}: this loss couples the pairs of a step, so their scores come first and the "
            "gradients after; use --segmentation two_pass or auto"
        )


def choose_strategy(
    name: str, *, rows: int, segment_rows: int, keeps_gradients_sharded: bool, whole_batch: bool
) -> tuple[str, str]:
    """(strategy, why) for ``--segmentation``. ``whole_batch``: the loss couples the pairs of a global step."""
    check_segmentation(name, whole_batch=whole_batch)
    if whole_batch:
        return "two_pass", "the loss couples the pairs of a step"
    if name != "auto":
        return name, "as asked for"
    if rows <= segment_rows:
        return "none", f"all {rows} rows of a micro-batch fit in one segment"
    if keeps_gradients_sharded:
        return "two_pass", "ZeRO-3 stays sharded when a module is used once a backward"
    return "checkpoint", "gradients are reduced once a micro-batch"
