"""The likelihood of an answer under the sampler that reveals one token at a time, the surest place first.

Such a sampler decides where to write next from what stands there already (the place whose best token is likeliest) and
draws the token from the model at temperature 1. The order is then a function of the answer, and the probability of the
answer is exactly the product of its tokens' probabilities in that order, with no noise and no bound (DUEL, arXiv
2603.01367):

    log p(y|x) = Σ_s log p(y_{σ(s)} | x, y_{σ(1)}, ..., y_{σ(s-1)}),   σ(s) = argmax_i max_v p_i(v | x, y_{σ(<s)})

A forward reveals one token of every answer (of a block-causal family one of every block, as a block does not depend on
the blocks after it), so answers of L tokens take L forwards, one after the other.

Shape suffixes: B pairs, 2 sides (0 chosen, 1 rejected), A = 2B answers (2 b + side), M masked positions, R rows,
L tokens of an answer.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import PairBatch
from diffdpo.models.architecture.backbone import native
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.plan import NoisePlan
from diffdpo.noise.rows import NoisyRows, rows_of_plans
from diffdpo.scores.fold import PairScores
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import Segments
from diffdpo.scores.shared_clean import clean_inputs, run_clean


@torch.no_grad()
def sampler_order_scores(
    forward: Callable[..., Tensor],
    batch: PairBatch,
    noise: NoiseOptions,
    *,
    device: torch.device,
    segments: Segments,
) -> PairScores:
    """Log-likelihoods in nats, float64 on the CPU, with standard errors of 0; ``noise`` is asked for the mask and the
    blocks alone. ``batch`` is on the CPU. Of places that are equally sure the leftmost comes first."""
    assert isinstance(forward, MaskedLogProbs), "an engine trains, and nothing is trained with this score"
    batch, block_size = noise.as_scored(batch), noise.block_size
    start_A = batch.prompt_lengths_B2.flatten().numpy()
    length_A = (batch.lengths_B2 - batch.prompt_lengths_B2).flatten().numpy()
    masked, score_A = [np.ones(length, dtype=bool) for length in length_A], np.zeros(len(length_A))
    module = _AlsoTheBest.like(forward)
    while any(masked_L.any() for masked_L in masked):
        rows = _rows_of(batch, masked, noise)
        answer_M = rows.answer_R[rows.row_M].numpy()
        offset_M = np.concatenate([np.flatnonzero(masked[answer]) for answer in rows.answer_R.tolist()])
        block_M = (start_A[answer_M] + offset_M) // block_size if block_size else np.zeros_like(offset_M)
        logp_M2 = _forward(module, rows.to(device), segments)
        for place in _surest(answer_M, block_M, logp_M2[:, 1]):
            score_A[answer_M[place]] += logp_M2[place, 0]
            masked[answer_M[place]][offset_M[place]] = False
    score_B2 = torch.from_numpy(score_A).view(-1, 2)
    return PairScores(score_B2, torch.zeros_like(score_B2), torch.from_numpy(length_A).long().view(-1, 2))


class _AlsoTheBest(MaskedLogProbs):
    """Gives [M, 2]: log p of the target, and of the likeliest token in its place."""

    @classmethod
    def like(cls, forward: MaskedLogProbs) -> "_AlsoTheBest":
        """A scorer of the model in ``forward`` that runs as it does; tokens are counted there."""
        budget, waste = forward.logits_budget, forward.max_waste
        module = cls(forward.model, forward.spec, logits_budget=budget, max_waste=waste, flex=forward.flex)
        module.counted = forward.counted
        return module.eval()

    def log_probs(self, hidden_MK: Tensor, target_M: Tensor) -> Tensor:
        return native(self.model).head(hidden_MK, target_M, logits_budget=self.logits_budget, also_best=True)


def _rows_of(batch: PairBatch, masked: Sequence[np.ndarray], noise: NoiseOptions) -> NoisyRows:
    """A row for every answer that is not all revealed, all that it masks to be scored."""
    # in the batch's order and not by id: the choices of a question share theirs
    present = iter([masked_L[None] for masked_L in masked if len(masked_L)])

    def plan(_prompt: int, length: int, _record_id: str, _side: int) -> NoisePlan:
        masked_1L = next(present)
        return NoisePlan(masked_1L, masked_1L, np.ones(1), np.array([float(length)]))

    mask, block = noise.mask_token_id, noise.block_size
    rows = rows_of_plans(batch, plan, empty_rows=1, mask_token_id=mask, block_size=block)
    return rows.taken(rows.row_M.unique())


def _forward(module: MaskedLogProbs, rows: NoisyRows, segments: Segments) -> np.ndarray:
    """[M, 2] in the order of the rows' scored positions, segment by segment."""
    found_M2 = np.empty((len(rows.target_M), 2))
    for group in segments.by_stream(rows):
        kept = run_clean(module, group)
        for segment in group:
            part = segment.rows
            inputs = (part.input_ids_RT, part.lengths_R, part.row_M, part.position_M, part.target_M)
            logp_M2 = module(*inputs, *clean_inputs(part, kept))
            place_M = torch.cat([(rows.row_M == row).nonzero()[:, 0] for row in segment.index_S])
            found_M2[place_M.cpu().numpy()] = logp_M2.double().cpu().numpy()
    return found_M2


def _surest(answer_M: np.ndarray, block_M: np.ndarray, sure_M: np.ndarray) -> np.ndarray:
    """The surest place of every block of every answer."""
    order = np.lexsort((np.arange(len(sure_M)), -sure_M, block_M, answer_M))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (np.diff(answer_M[order]) != 0) | (np.diff(block_M[order]) != 0)
    return order[first]
