"""A few steps of preference training: the scores, gradients and losses by which two ways to compute are compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import Encoder, TokenPair
from data_pipeline.generate import generate_pairs
from data_pipeline.records import record_from_fields
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.losses.options import LossOptions
from diffdpo.models.load import LoadedModel
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import frozen_reference, remembered
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

PAIRS, SAMPLES, STEPS, SEGMENT_ROWS = 4, 3, 3, 5
RATE = 1e-3
LOSS = LossOptions(("sigmoid", "sft"), (1.0, 0.05), beta=0.2)
"""Not sigmoid alone: before the first step its gradient is of no more than the difference of two alike answers."""


@dataclass(frozen=True)
class Measured:
    """On the host, in float64: ``score_token_A``, scores of the answers in nats a token; ``gradient`` of the first
    step, by parameter; ``losses`` of each step."""

    score_token_A: Tensor
    gradient: Mapping[str, Tensor]
    losses: tuple[float, ...]


def measure(scorer: MaskedLogProbs, batch: PairBatch, device: torch.device, *, strategy: str) -> Measured:
    """Train ``scorer`` on ``batch`` for some steps; its reference is itself as it was before."""
    world = World(rank=0, local_rank=0, size=1, device=device)
    engine = PlainEngine(scorer, world, OptimizerOptions(learning_rate=RATE))
    segments, spec = Segments(rows=SEGMENT_ROWS), scorer.spec
    noise = NoiseOptions("mask_count", SAMPLES, 0, spec.mask_token_id, block_size=spec.block_size)
    rows = noise.draw_rows(batch, device)
    scores = fold(score_rows(engine, rows, segments=segments), rows)
    reference = remembered(frozen_reference(engine, segments), segments)
    step = PreferenceStep(engine, reference, noise, LOSS, strategy=strategy, segments=segments)
    gradient: dict[str, Tensor] = {}

    def caught(*_: object) -> None:
        for name, parameter in scorer.named_parameters():
            if parameter.grad is not None and name not in gradient:
                gradient[name] = parameter.grad.detach().to("cpu", torch.float64, copy=True)

    with_hook = engine.optimizer.register_step_pre_hook(caught)
    reports = [step([batch], RATE) for _ in range(STEPS)]
    with_hook.remove()
    per_token = scores.score_B2.double() / scores.tokens_B2.clamp(min=1)
    losses = tuple(report.loss + (report.sft_loss or 0.0) for report in reports)
    return Measured(per_token.flatten().cpu(), gradient, losses)


def sample_batch(loaded: LoadedModel) -> PairBatch:
    """Generated pairs of unequal lengths in the model's tokens."""
    encoder = Encoder(loaded.tokenizer, max_length=160, max_prompt_length=96, terminator=loaded.spec.terminator_id)
    pairs = encoder.encode_many([record_from_fields(record) for record in generate_pairs(PAIRS, seed=0)])
    whole = [pair for pair in pairs if isinstance(pair, TokenPair)]
    assert len(whole) == PAIRS, "generated pairs fit"
    return collate(whole, pad_id=loaded.spec.pad_token_id, epoch=0, step=0, micro=0, last_micro=True)
