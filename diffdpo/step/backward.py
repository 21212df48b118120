"""How the segments of a micro-batch become one gradient.

A segment is a forward of bounded size (``step.segments``). Every strategy gives the gradient of one graph over all
rows:

===========  ============================================  ==================  =================================
strategy     how                                           cost (full / LoRA)  memory above weights
===========  ============================================  ==================  =================================
none         one graph                                     3F / 2F             all rows
checkpoint   a non-reentrant checkpoint round each         4F / 3F             one segment
             segment, one backward
two_pass     no graph: dL/df of every row; then forward    4F / 3F             one segment
             and backward of each segment
deferred     backward of each segment at once, with unit   3F / 2F             one segment and two more gradients
             weight; dL/dS multiplies the sum of an
             answer's when its pair is complete
===========  ============================================  ==================  =================================

Ranks that must call the model equally often get equally many segments (see ``Segments``).

Shape suffixes: R rows, S rows of a segment, A answers.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint as recompute

from diffdpo.engine.base import Engine
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segment, Segments, in_order
from diffdpo.scores.shared_clean import CleanGradient, KeptClean, run_clean

LossOf = Callable[[torch.Tensor], torch.Tensor]
"""Row scores f_R of the policy → the micro-batch's share of the loss, a scalar."""


class Backward(Protocol):
    """A strategy: add the gradient of ``loss_of`` at ``rows`` to the engine; return f_R, detached."""

    def __call__(
        self, engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segments: Segments, last: bool
    ) -> torch.Tensor: ...


def none(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segments: Segments, last: bool) -> torch.Tensor:
    """One graph over all rows, whatever the size of ``segments``."""
    f_R = forward_rows(engine, segments.whole(rows))
    engine.backward(loss_of(f_R), last=last)
    return f_R.detach()


def checkpoint(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segments: Segments, last: bool) -> torch.Tensor:
    """Each segment recomputed in the backward of one graph: every gradient is reduced (and offloaded) once."""

    def run(piece: Segment, kept: KeptClean | None) -> torch.Tensor:
        # no randomness inside (dropout is off), hence no generator state to restore; and no check of recomputed
        # tensors, which ZeRO-3's release of frozen weights would trip
        return recompute(
            lambda: forward_rows(engine, piece.rows, kept),
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
        )

    pieces, values = [], []
    for group in segments.by_stream(rows):
        kept = run_clean(engine, group)
        pieces += group
        values += [run(piece, kept) for piece in group]
    f_R = in_order(pieces, values)
    # segments that fill up take part in the backward, where every rank must recompute as many
    fill = sum(value_S.sum() for piece, value_S in zip(pieces, values, strict=True) if not len(piece.index_S))
    engine.backward(loss_of(f_R) + 0.0 * fill, last=last)
    return f_R.detach()


def two_pass(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segments: Segments, last: bool) -> torch.Tensor:
    """Scores first, then gradients: nothing but the weights outlives a segment, and no module is used twice. Where all
    rows share one clean stream it is run once, and its graph waits for the second pass."""
    groups = segments.by_stream(rows)
    clean = shared(engine, groups[0]) if len(groups) == 1 else None
    if clean is None:
        f_R = score_rows(engine, rows, segments=segments)
    else:
        with torch.no_grad():
            f_R = in_order(groups[0], [forward_rows(engine, piece.rows, clean.leaves) for piece in groups[0]])
    _replay(engine, groups, gradient_of(loss_of, f_R), last=last, clean=clean)
    return f_R


def gradient_of(loss_of: LossOf, f_R: torch.Tensor) -> torch.Tensor:
    """dL/df of every row: all that the second pass needs to know of the loss."""
    with torch.enable_grad():
        leaf_R = f_R.detach().requires_grad_()
        return torch.autograd.grad(loss_of(leaf_R), leaf_R)[0]


def replay(engine: Engine, rows: NoisyRows, gradient_R: torch.Tensor, *, segments: Segments, last: bool) -> None:
    """Second pass: add Σ_R dL/df · ∇f; a forward and backward a segment, and one of the clean tokens they share."""
    _replay(engine, segments.by_stream(rows), gradient_R, last=last)


def _replay(
    engine: Engine,
    groups: Sequence[Sequence[Segment]],
    gradient_R: torch.Tensor,
    *,
    last: bool,
    clean: CleanGradient | None = None,
) -> None:
    """``clean``: of the only group, where it has been run."""
    for index, group in enumerate(groups):
        clean = clean or shared(engine, group)
        for number, piece in enumerate(group, start=1):
            closes = number == len(group)
            # the last segment of a group takes the clean gradient of all of them back with its own: DeepSpeed closes a
            # step with what its last backward reaches, and the clean stream alone does not reach the head
            kept = (clean.kept if closes else clean.leaves) if clean else None
            loss = (forward_rows(engine, piece.rows, kept) * piece.of(gradient_R)).sum()
            if clean and closes:
                loss = loss + clean.loss()
            engine.backward(loss, last=last and closes and index == len(groups) - 1)
            if clean and not closes:
                clean.collect()
        clean = None


def shared(engine: Engine, group: Sequence[Segment]) -> CleanGradient | None:
    """The clean stream that the segments of a group have in common, with its graph; None where there is none."""
    kept = run_clean(engine, group)
    return CleanGradient(kept, factor=engine.loss_factor) if kept else None


def deferred(engine: Engine, rows: NoisyRows, loss_of: LossOf, *, segments: Segments, last: bool) -> torch.Tensor:
    """∇S of each answer, whatever the loss; then add dL/dS · ∇S of both answers once the pair is complete.

    Inside ``engine.no_sync()``: ``.grad`` is this rank's own. The loss must be a sum over pairs, as a pair's dL/dS is
    asked for while later pairs are unknown. Three gradients are held: of all before, of one answer, of the other. Clean
    tokens that the pair shares take dL/dS of both answers at once, when it is complete.
    """
    parameters, f_R = engine.parameters, torch.zeros(len(rows), device=rows.lengths_R.device)
    answers = iter(segments.by_answer(rows))

    def gradient_of_score(pieces: list[Segment], clean: CleanGradient | None) -> torch.Tensor:
        for piece in pieces:
            f_S = forward_rows(engine, piece.rows, clean.leaves if clean else None)
            engine.backward((f_S * piece.of(rows.weight_R).to(f_S.dtype)).sum(), last=last)
            f_R[piece.index_S] = f_S.detach()
            if clean:
                clean.collect()
        return torch.cat([piece.index_S for piece in pieces])

    for pair in zip(answers, answers, strict=True):
        clean = shared(engine, pair[0] + pair[1]) if rows.clean is not None and segments.world is None else None
        before = _taken(parameters)
        chosen_S = gradient_of_score(pair[0], clean)
        unit, kept_unit = _taken(parameters), clean.taken() if clean else None
        rejected_S = gradient_of_score(pair[1], clean)
        gradient_R = gradient_of(loss_of, f_R)
        slope = [_slope(gradient_R[index_S], rows.weight_R[index_S]) for index_S in (chosen_S, rejected_S)]
        _combine(parameters, slope[1], unit, slope[0], before)
        if clean and clean.trained and kept_unit is not None:
            engine.backward(clean.loss((slope[0], kept_unit), (slope[1], clean.taken())), last=last)
    return f_R


def _slope(gradient_S: torch.Tensor, weight_S: torch.Tensor) -> float:
    """dL/dS of an answer from dL/df = dL/dS · weight of its rows; 0 for an answer that is absent."""
    gradient_S, weight_S = gradient_S.double(), weight_S.double()
    norm = float(weight_S @ weight_S)
    return float(gradient_S @ weight_S) / norm if norm else 0.0


def _taken(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """The gradients so far, taken from the parameters."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def _combine(
    parameters: Sequence[torch.nn.Parameter],
    slope: float,
    unit: Sequence[torch.Tensor | None],
    unit_slope: float,
    before: Sequence[torch.Tensor | None],
) -> None:
    """grad ← slope · grad + unit_slope · unit + before, in place: ZeRO-3 does not let ``.grad`` be set."""
    for parameter, unit_grad, old_grad in zip(parameters, unit, before, strict=True):
        if parameter.grad is None or unit_grad is None:
            raise RuntimeError("deferred: a trained parameter took no part in a forward; use another --segmentation")
        parameter.grad.mul_(slope).add_(unit_grad, alpha=unit_slope)
        if old_grad is not None:
            parameter.grad.add_(old_grad)


STRATEGIES: dict[str, Backward] = {
    "none": none,
    "checkpoint": checkpoint,
    "two_pass": two_pass,
    "deferred": deferred,
}
