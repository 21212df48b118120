"""Scoring outside training: batches of pairs under one model, or under two with shared noise. No gradients.

Shape suffixes: R rows, B pairs, 2 sides (0 chosen, 1 rejected).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from data_pipeline.batch import collate
from data_pipeline.encode import Drop, Encoder, TokenPair
from data_pipeline.records import Record
from diffdpo.config import ScoreConfig
from diffdpo.errors import UserError
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import LoadedModel
from diffdpo.noise.estimators import MAX_EXACT_LENGTH, SAMPLER_ORDER
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import PairScores, fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.scores.sampler_order import sampler_order_scores
from diffdpo.scores.segments import Segments


class Scorer:
    """Records to lines of scores, under one model or under two with shared noise."""

    def __init__(self, models: Sequence[LoadedModel], settings: ScoreConfig):
        spec, tokenizer = models[0].spec, models[0].tokenizer
        self.models = [MaskedLogProbs(one.model, one.spec).eval() for one in models]
        self.encoder = make_encoder(settings, tokenizer, spec)
        self.noise = NoiseOptions.of(settings, spec)
        self.segments, self.batch_size = Segments(rows=settings.segment_rows), settings.batch_size
        self.dropped: list[tuple[str, Drop]] = []  # (id, why) of records that were left out

    def __call__(self, records: Iterable[Record]) -> Iterator[tuple[str, dict]]:
        """(id, line) of every record that can be scored, in order; batch by batch. UserError for a score that is no
        finite number."""
        device = next(self.models[0].parameters()).device
        for pairs in batches(encoded(records, self.encoder, self.dropped, self.noise), self.batch_size):
            scores, ratio = score_pairs(pairs, self.models, self.noise, device=device, segments=self.segments)
            check_finite(pairs, scores)
            for index, pair in enumerate(pairs):
                yield pair.id, as_line(pair, index, scores, ratio)


def score_pairs(
    pairs: Sequence[TokenPair],
    models: Sequence[Callable[..., torch.Tensor]],
    noise: NoiseOptions,
    *,
    device: torch.device,
    segments: Segments,
) -> tuple[list[PairScores], PairScores | None]:
    """Each model's scores of a batch, and with two models the scores' difference first - second (log-ratios).

    The models read the same rows, of epoch 0; by ``sampler_order`` each reads its own. UserError for ``exact`` on long
    answers.
    """
    batch = collate(list(pairs), pad_id=noise.mask_token_id, epoch=0, step=0, micro=0, last_micro=True)
    if noise.estimator == SAMPLER_ORDER:
        scores = [sampler_order_scores(model, batch, noise, device=device, segments=segments) for model in models]
        gap_B2 = scores[0].score_B2 - scores[-1].score_B2
        return scores, replace(scores[0], score_B2=gap_B2) if len(scores) == 2 else None
    rows = noise.draw_rows(batch, device)
    f = [score_rows(model, rows, segments=segments) for model in models]
    ratio = fold(f[0] - f[1], rows) if len(f) == 2 else None
    return [fold(f_R, rows) for f_R in f], ratio


def check_finite(pairs: Sequence[TokenPair], scores: Sequence[PairScores]) -> None:
    """UserError that names the first record without a finite score: JSON has no NaN, and no reader expects one."""
    for number, model in enumerate(scores):
        for pair, score_2 in zip(pairs, model.score_B2, strict=True):
            if not score_2.isfinite().all():
                raise UserError(
                    f"record {pair.id!r}: the {'reference' if number else 'model'} gives it no finite score "
                    f"({', '.join(f'{score:g}' for score in score_2.tolist())}); its weights are damaged or diverged, "
                    "or overflow in 16 bits (--dtype float32)"
                )


def encoded(
    records: Iterable[Record], encoder: Encoder, dropped: list[tuple[str, Drop]], noise: NoiseOptions
) -> Iterator[TokenPair]:
    """Records in tokens; those the encoder leaves out, or that ``exact`` cannot enumerate, are appended to ``dropped``
    with their id."""
    for record in records:
        pair = encoder(record)
        whole = noise.estimator == "exact" and not noise.block_size  # enumerates the masks of the whole answer
        if not isinstance(pair, Drop) and whole and longest(pair) > MAX_EXACT_LENGTH:
            pair = Drop("too_long_for_exact", f"({longest(pair)} tokens in an answer, {MAX_EXACT_LENGTH} at most)")
        if isinstance(pair, Drop):
            dropped.append((record.id, pair))
        else:
            yield pair


def batches(pairs: Iterable[TokenPair], size: int) -> Iterator[list[TokenPair]]:
    """Lists of ``size`` pairs, the last one shorter."""
    iterator = iter(pairs)
    while batch := list(islice(iterator, size)):
        yield batch


def as_line(pair: TokenPair, index: int, scores: Sequence[PairScores], ratio: PairScores | None) -> dict:
    """One record's scores as a JSON object; null for an unknown standard error, no key for an absent side."""
    line: dict = {"id": pair.id}
    for side, (name, answer) in enumerate((("chosen", pair.chosen), ("rejected", pair.rejected))):
        if answer is None:
            continue
        first = scores[0]
        line[name] = {
            "score": first.score_B2[index, side].item(),
            "stderr": _known(first.stderr_B2[index, side]),
            "tokens": int(first.tokens_B2[index, side]),
        }
        if ratio is not None:
            line[name] |= {
                "reference_score": scores[1].score_B2[index, side].item(),
                "log_ratio": ratio.score_B2[index, side].item(),
                "log_ratio_stderr": _known(ratio.stderr_B2[index, side]),
            }
    return line


def _known(stderr: torch.Tensor) -> float | None:
    return None if stderr.isnan() else stderr.item()


def longest(pair: TokenPair) -> int:
    """Scored tokens of the longer answer."""
    return max(len(a.ids) - a.prompt_length for a in (pair.chosen, pair.rejected) if a is not None)
