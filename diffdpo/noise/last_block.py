"""Answers filled up with terminators to the end of their last block: an option of block-causal families.

Some training code (LLaDA2's) rounds lengths up to whole blocks with end tokens that are masked and scored like others.
Without the option nothing stands behind an answer's terminator.

Shape suffixes: B records, 2 sides, T longest row.
"""

from dataclasses import replace

import torch

from data_pipeline.batch import PairBatch


def with_whole_blocks(batch: PairBatch, *, block_size: int, terminator_id: int) -> PairBatch:
    """Every answer that ends with a terminator extended with more of them to whole blocks; one that was cut stays."""
    lengths_B2 = batch.lengths_B2
    last_B2 = batch.input_ids_B2T.gather(2, (lengths_B2 - 1).clamp(min=0)[..., None])[..., 0]
    ended_B2 = (lengths_B2 > batch.prompt_lengths_B2) & (last_B2 == terminator_id)
    wanted_B2 = torch.where(ended_B2, -(-lengths_B2 // block_size) * block_size, lengths_B2)
    grown = max(0, int(wanted_B2.max()) - batch.input_ids_B2T.shape[-1])
    ids_B2T = torch.nn.functional.pad(batch.input_ids_B2T, (0, grown), value=terminator_id)
    behind_B2T = torch.arange(ids_B2T.shape[-1]) >= lengths_B2[..., None]
    return replace(batch, input_ids_B2T=ids_B2T.masked_fill(behind_B2T, terminator_id), lengths_B2=wanted_B2)
