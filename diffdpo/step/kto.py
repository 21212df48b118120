"""KTO's reference point z: how much likelier than under the reference the policy makes answers to other prompts.

Shape suffixes: B records, 2 sides.
"""

from collections.abc import Callable, Sequence

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.losses.mismatched import mismatched
from diffdpo.losses.preference import reference_point_of
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import fold
from diffdpo.scores.reference import Reference
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.retry import run_on_all_ranks


def reference_point(
    engine: Engine,
    reference: Reference,
    rows_of: Callable[[PairBatch], NoisyRows],
    micro_batches: Sequence[PairBatch],
    *,
    segments: Segments,
    max_length: int | None,
    training: bool = True,
) -> torch.Tensor:
    """z of ``kto`` over the global step, a scalar in nats, the same on every rank; no graph.

    A function of the step's records: neither the number of ranks nor the size of a micro-batch changes which answer
    meets which prompt. Every rank calls, with as many micro-batches of one size. StepTooLarge on all when memory ran
    out on any; ``training``: in a step, which not every engine can repeat.
    """
    world = engine.world
    batches = mismatched(world.all_gather_object(list(micro_batches)), rank=world.rank, max_length=max_length)

    def table(batch: PairBatch) -> torch.Tensor:
        rows = rows_of(batch)
        policy_R = score_rows(engine, rows, segments=segments)
        ratio_B2 = fold(policy_R - reference(rows, batch), rows).score_B2
        return torch.stack([ratio_B2, batch.weight_B2.to(world.device)], 1)

    tables = run_on_all_ranks(engine, lambda: [table(batch) for batch in batches], graph=training)
    ratio_B2, weight_B2 = world.all_gather(torch.cat(tables)).unbind(1)
    return reference_point_of(ratio_B2, torch.zeros_like(ratio_B2), weight_B2)
