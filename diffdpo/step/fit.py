"""Segments and micro-batch under ``--max_memory``: measured on the run's own engine before the first step."""

import torch

from diffdpo.engine.base import Engine
from diffdpo.engine.fsdp2_units import own_part
from diffdpo.memory.largest_fit import TOO_MUCH, Fit, largest_fit, memory_budget, peak_of
from diffdpo.noise.rows import CleanAnswers, NoisyRows
from diffdpo.scores.rows import forward_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.retry import StepTooLarge, run_on_all_ranks
from diffdpo.step.strategy import MicroBatchShape


def fit_segments(
    engine: Engine, segments: Segments, shape: MicroBatchShape, *, fraction: float, accumulation: int = 1
) -> Fit:
    """Measure, and set the tokens of ``segments`` to what fits in ``fraction`` of the device's memory: at most the rows
    of ``accumulation`` micro-batches."""
    world = engine.world

    def measure(rows: int) -> int:
        probe = longest_rows(rows, shape.max_length, block_size=shape.block_size).to(world.device)

        def run() -> None:
            # weight 0: a backward of the usual size that adds nothing to the gradient
            engine.backward((forward_rows(engine, probe) * 0.0).sum(), last=False)

        try:
            peak = run_on_all_ranks(engine, lambda: peak_of(run, world.device))
        except StepTooLarge:
            return TOO_MUCH
        finally:
            engine.abort_step()
        return world.all_reduce_max(peak)

    budget = -world.all_reduce_max(-memory_budget(fraction, world.device, reserve=_reserve(engine)))
    fit = largest_fit(measure, budget=budget, most=accumulation * shape.rows)
    segments.resize(fit.rows * shape.max_length)
    return fit


def longest_rows(rows: int, length: int, *, block_size: int | None = None) -> NoisyRows:
    """Rows of ``length`` tokens, all but the first masked and scored: as much as a row can ask for. Of a block-causal
    family they look back on one clean answer without a prompt."""
    place_RT = torch.arange(length).expand(rows, length)[:, 1:]
    row_M = torch.arange(rows).repeat_interleave(length - 1)
    ones_R = torch.ones(rows)
    ids_RT = torch.zeros(rows, length, dtype=torch.long)
    clean = None
    if block_size:
        zero_A = torch.zeros(1, dtype=torch.long)
        clean = CleanAnswers(ids_RT[:1], zero_A + (length - 1) // block_size * block_size, zero_A, zero_A)
    return NoisyRows(
        input_ids_RT=ids_RT,
        lengths_R=torch.full((rows,), length),
        answer_R=torch.zeros(rows, dtype=torch.long),
        weight_R=ones_R,
        share_R=ones_R,
        row_M=row_M,
        position_M=place_RT.reshape(-1),
        target_M=torch.zeros_like(row_M),
        scale_M=torch.ones(len(row_M)),
        tokens_A=torch.tensor([length - 1]),
        block_R=torch.arange(rows),
        cell_R=torch.zeros(rows, dtype=torch.long),
        clean=clean,
    )


def fit_micro_batch(fit: Fit, shape: MicroBatchShape, accumulation: int) -> int:
    """Pairs of the largest micro-batch of the same step whose rows all fit in one graph, so that none is computed
    twice; those of ``shape`` where not even a pair does, or where scores come before any graph."""
    step, most = accumulation * shape.pairs, fit.rows // (2 * shape.rows_per_answer)
    if shape.couples_pairs:
        return shape.pairs
    return max((pairs for pairs in range(1, most + 1) if step % pairs == 0), default=shape.pairs)


def _reserve(engine: Engine) -> int:
    """Bytes that are not there yet: Adam's moments (which DeepSpeed has made by now), the buffers of ``deferred``."""
    trained = sum(own.numel() * own.element_size() for own in map(own_part, engine.parameters))
    moments = 0 if engine.choice.makes_moments_at_once else 2 * trained
    return moments + (0 if engine.no_sync_obstacle() else 2 * trained)
