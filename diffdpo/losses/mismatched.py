"""Answers set against other records' prompts: what KTO's reference point z is estimated from.

Shape suffixes: B records, 2 sides, T longest row.
"""

from dataclasses import replace

import torch

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair


def mismatched(batch: PairBatch) -> PairBatch:
    """The same batch with each prompt followed by the answer of the answer before it (cyclically), as in KTO, sec. 4.1.

    Order is (pair 0 chosen, pair 0 rejected, pair 1 chosen, ...), absent sides skipped. For ``kl_estimate`` score it
    under policy and reference without a gradient. A batch with a single answer has nothing to mismatch and is returned
    with that answer as it is; z then rises with the answer's own reward, so use at least two records a micro-batch.
    """
    present = [(b, side) for b in range(len(batch.ids)) for side in (0, 1) if batch.lengths_B2[b, side] > 0]
    cells: dict[tuple[int, int], TokenAnswer] = {}
    for (b, side), (other, other_side) in zip(present, present[-1:] + present[:-1], strict=True):
        prompt = int(batch.prompt_lengths_B2[b, side])
        start, stop = int(batch.prompt_lengths_B2[other, other_side]), int(batch.lengths_B2[other, other_side])
        joined = torch.cat([batch.input_ids_B2T[b, side, :prompt], batch.input_ids_B2T[other, other_side, start:stop]])
        cells[b, side] = TokenAnswer(joined.int().numpy(), prompt)
    pairs = [
        TokenPair(f"{name}/mismatched", cells.get((b, 0)), cells.get((b, 1))) if name else None
        for b, name in enumerate(batch.ids)
    ]
    joined_batch = collate(
        pairs, pad_id=0, epoch=batch.epoch, step=batch.step, micro=batch.micro, last_micro=batch.last_micro
    )
    return replace(joined_batch, weight_B2=batch.weight_B2)
