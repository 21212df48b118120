"""LD-DPO (arXiv 2409.06411): what the longer answer of a pair has more than the other counts less."""

from dataclasses import replace

import torch

from data_pipeline.batch import PairBatch
from diffdpo.noise.rows import NoisyRows


def with_shorter_tails(rows: NoisyRows, batch: PairBatch, *, alpha: float, block_size: int | None = None) -> NoisyRows:
    """``rows`` whose tokens beyond the length of the pair's shorter answer are weighted by ``alpha``, under policy and
    reference alike, as TRL's ``ld_alpha``.

    A score is a sum over tokens, so this is defined; but it splits the bound by place and not a likelihood by its
    factors: what a token here is worth depends on tokens to its right too. An answer whose other side is absent keeps
    its weights.
    """
    length_B2 = (batch.lengths_B2 - batch.prompt_lengths_B2).long()
    shared_A = length_B2.min(1, keepdim=True).values.expand(-1, 2).flatten()
    shared_A = torch.where(shared_A > 0, shared_A, length_B2.flatten())
    prompt_A = batch.prompt_lengths_B2.flatten().long()
    if block_size:
        prompt_A = prompt_A % block_size  # rows begin with the block that the answer begins in
    answer_M = rows.answer_R[rows.row_M]
    tail_M = rows.position_M - prompt_A[answer_M] >= shared_A[answer_M]
    return replace(rows, scale_M=torch.where(tail_M, alpha * rows.scale_M, rows.scale_M))
