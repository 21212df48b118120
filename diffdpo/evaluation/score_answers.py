"""Scores of single answers outside training, each under noise that a name of the caller's decides.

Answers that share a name share their noise: the i-th tokens of two of them draw the same number, so of two that are as
long the same places are masked, and what they have in common cancels in the difference of their scores.

Shape suffixes: A answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.errors import UserError
from diffdpo.noise.estimators import SAMPLER_ORDER
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold
from diffdpo.scores.rows import score_rows
from diffdpo.scores.sampler_order import sampler_order_scores
from diffdpo.scores.segments import Segments


@dataclass(frozen=True)
class NamedAnswer:
    """Tokens of prompt and answer; the answer's, from ``prompt_length`` on, are scored, the prompt's never masked.
    ``noise``: whose masks."""

    noise: str
    ids: Sequence[int]
    prompt_length: int


@dataclass(frozen=True)
class Score:
    """In nats, a sum over tokens. ``stderr``: of the noise; 0 where every mask was enumerated, None if unknown."""

    score: float
    stderr: float | None


def score_answers(
    forward: Callable[..., torch.Tensor],
    answers: Sequence[NamedAnswer],
    noise: NoiseOptions,
    *,
    device: torch.device,
    segments: Segments,
) -> list[Score]:
    """The score of each answer, in order. An answer so short that all of its masks take no more forwards than
    ``noise.num_samples`` is enumerated instead: exact, and of one token in one forward (not by ``sampler_order``, which
    is another likelihood). UserError for a score that is no finite number."""
    found: dict[int, Score] = {}
    exact = replace(noise, estimator="exact")
    for options, wanted in ((exact, True), (noise, False)):
        numbers = [i for i, answer in enumerate(answers) if _is_enumerated(answer, noise) is wanted]
        if not numbers:
            continue
        pairs = [_as_pair(answers[i]) for i in numbers]
        batch = collate(pairs, pad_id=noise.mask_token_id, epoch=0, step=0, micro=0, last_micro=True)
        if options.estimator == SAMPLER_ORDER:
            scores = sampler_order_scores(forward, batch, options, device=device, segments=segments)
        else:
            rows = options.draw_rows(batch, device)
            scores = fold(score_rows(forward, rows, segments=segments), rows)
        for place, i in enumerate(numbers):
            score, stderr = scores.score_B2[place, 0].item(), scores.stderr_B2[place, 0].item()
            if not np.isfinite(score):
                raise UserError(
                    f"{answers[i].noise}: the model gives no finite score ({score:g}); its weights are damaged or "
                    "diverged, or overflow in 16 bits"
                )
            found[i] = Score(score, None if np.isnan(stderr) else stderr)
    return [found[i] for i in range(len(answers))]


def _is_enumerated(answer: NamedAnswer, noise: NoiseOptions) -> bool:
    if noise.estimator == SAMPLER_ORDER:
        return False
    return not noise.block_size and 2 ** (len(answer.ids) - answer.prompt_length) - 1 <= noise.num_samples


def _as_pair(answer: NamedAnswer) -> TokenPair:
    ids = np.array(answer.ids, dtype=np.int32)
    return TokenPair(id=answer.noise, chosen=TokenAnswer(ids, answer.prompt_length), rejected=None)
