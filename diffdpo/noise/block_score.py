"""The score of a block-causal family: the sum over blocks of each block's any-order ELBO given the clean blocks before
it.

    B(y|x) = Σ_b E_{k~U{1..L_b}} E_{|m|=k} [ (L_b / k) f_b(m) ],    f_b(m) = Σ_{i∈m} log p(y_i | block b without m,
    blocks < b)

Given the clean tokens before it, a block does not depend on what is masked in any other. So the score is estimated by
each block's own estimator, and one row serves all of them at once: it has a mask of each block. Which of a block's
masks stands in which row changes no term of the sum; here they are shifted by one row a block, so that a row has small
masks in some blocks and large ones in others, and rows are alike in work and in weight (docs/theory.md, section 6).

Shape suffixes: N rows, L tokens of the answer.
"""

from collections.abc import Sequence

import numpy as np

from diffdpo.errors import UserError
from diffdpo.noise.estimators import AUTO, MAX_EXACT_LENGTH, check_estimator, drawn, generator_of, num_rows
from diffdpo.noise.plan import NoiseKey, NoisePlan

AFFORDABLE_ROWS = 16
"""Up to so many rows an answer ``auto`` enumerates blocks: those of 4 take 15."""


def block_tokens(prompt: int, length: int, block_size: int) -> list[int]:
    """How many of an answer's ``length`` tokens lie in each block, the blocks counted from the start of the prompt."""
    bounds = [prompt, *range((prompt // block_size + 1) * block_size, prompt + length, block_size), prompt + length]
    return [int(size) for size in np.diff(bounds)]


def num_block_rows(estimator: str, *, block_size: int, num_samples: int) -> int:
    """Rows of an answer with a whole block in it, the most that an answer has."""
    return num_rows(estimator, length=block_size, num_samples=num_samples)


def resolved(estimator: str, block_size: int | None) -> tuple[str, str]:
    """(estimator, why) of ``--score_estimator``."""
    if estimator != AUTO:
        return estimator, "as asked for"
    if block_size and 2**block_size - 1 <= AFFORDABLE_ROWS:
        return "exact", f"the {2**block_size - 1} masks of a block of {block_size} in as many rows: no variance at all"
    return "balanced", f"blocks of {block_size} have too many masks for exact" if block_size else "attention is full"


def check_block_estimator(estimator: str, block_size: int) -> None:
    """UserError for ``exact`` where a block has too many masks to be enumerated."""
    if estimator == "exact" and block_size > MAX_EXACT_LENGTH:
        raise UserError(
            f"--score_estimator exact enumerates the masks of each block, of at most {MAX_EXACT_LENGTH} tokens; those "
            f"of this model have {block_size}: use balanced"
        )


def draw_block_plan(
    estimator: str,
    *,
    tokens: Sequence[int],
    num_samples: int,
    key: NoiseKey,
    num_diffusion_steps: int | None = None,
) -> NoisePlan:
    """The rows of an answer whose blocks have so many ``tokens`` each, see ``block_tokens``.

    ``num_samples`` rows; of ``exact`` as many as its largest block has masks, and a block with fewer masks is whole in
    the others. Every row has weight 1: a token's weight is that of its block's mask (``scale_NL``).
    """
    check_estimator(estimator, num_samples=num_samples, num_diffusion_steps=num_diffusion_steps)
    check_block_estimator(estimator, max(tokens))
    rng = generator_of(estimator, key)
    plans = [drawn(estimator, length, num_samples, rng, num_diffusion_steps) for length in tokens]
    rows = max(len(plan) for plan in plans)
    # the blocks of a NoisePlan, rows drawn together, are the same for all lengths, as they depend on n alone; its cells
    # of single rows mean another row in each block of tokens
    block_N, cell_N = (None, None) if plans[0].block_N is None else (plans[0].block_N, plans[0].cell_N)
    together_N = np.zeros(rows, np.int64) if block_N is None else block_N

    masked_NL, scored_NL = (np.zeros((rows, sum(tokens)), dtype=bool) for _ in range(2))
    scale_NL, share_N, stop = np.zeros((rows, sum(tokens))), np.zeros(rows), 0
    for index, plan in enumerate(plans):
        start, stop = stop, stop + plan.masked_NL.shape[1]
        own_N = _shifted(together_N, index)  # by one row a block of tokens
        place_N = np.flatnonzero(own_N < len(plan))  # a block with fewer masks is whole in the other rows
        own_N = own_N[place_N]
        masked_NL[place_N, start:stop], scored_NL[place_N, start:stop] = plan.masked_NL[own_N], plan.scored_NL[own_N]
        scale_NL[place_N, start:stop] = plan.weight_N[own_N, None] * _scale(plan)[own_N]
        share_N[place_N] += plan.share_N[own_N]
    return NoisePlan(masked_NL, scored_NL, np.ones(rows), share_N, scale_NL, block_N, cell_N)


def _shifted(block_N: np.ndarray, by: int) -> np.ndarray:
    """Indices of the rows, shifted by so many within each set of rows that were drawn together: sets stay apart."""
    return np.concatenate([np.roll(np.flatnonzero(block_N == block), by) for block in np.unique(block_N)])


def _scale(plan: NoisePlan) -> np.ndarray:
    return np.ones(plan.masked_NL.shape) if plan.scale_NL is None else plan.scale_NL
