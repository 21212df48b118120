"""Answers followed by more terminators than one: how a masked diffusion model learns to leave a canvas unfilled.

A sampler starts from a canvas of masks longer than the answer will be. A model trained on exact lengths only takes the
number of masks for the length of the answer and fills all of it. So LLaDA's supervised training pads answers with
terminators and scores them (arXiv 2502.09992, section 2.3). Here half of the answers are padded: the others keep the
exact length, which is how preference scores present them.

Shape suffixes: B records, 2 sides, T longest row.
"""

from dataclasses import replace

import numpy as np
import torch

from data_pipeline.batch import PairBatch
from diffdpo.noise.plan import NoiseKey

FILLED_SHARE = 0.5
DRAW = 2**31 - 1  # of the noise key: apart from every mask's draw


def fill_canvas(batch: PairBatch, *, canvas: int, terminator_id: int, seed: int) -> PairBatch:
    """Half of the chosen answers extended with terminators to ``canvas`` tokens (a function of seed, epoch, record).

    An answer that is longer, or was cut and has no terminator, stays as it is.
    """
    lengths_B2, prompts_B2 = batch.lengths_B2, batch.prompt_lengths_B2
    wanted_B2 = lengths_B2.clone()
    for b, record_id in enumerate(batch.ids):
        last = int(lengths_B2[b, 0]) - 1
        ended = last >= 0 and int(batch.input_ids_B2T[b, 0, last]) == terminator_id
        if ended and NoiseKey(seed, batch.epoch, record_id, 0, DRAW).generator().random() < FILLED_SHARE:
            wanted_B2[b, 0] = max(last + 1, int(prompts_B2[b, 0]) + canvas)
    ids_B2T = torch.full((*lengths_B2.shape, int(wanted_B2.max())), terminator_id, dtype=torch.long)
    ids_B2T[..., : batch.input_ids_B2T.shape[-1]] = batch.input_ids_B2T[..., : ids_B2T.shape[-1]]
    tail_B2T = torch.from_numpy(np.arange(ids_B2T.shape[-1])) >= lengths_B2[..., None]
    return replace(batch, input_ids_B2T=ids_B2T.masked_fill(tail_B2T, terminator_id), lengths_B2=wanted_B2)
