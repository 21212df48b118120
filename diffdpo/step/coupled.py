"""Losses that couple the pairs of a global step: scores of all ranks first, then every rank replays its own rows.

Shape suffixes: B pairs, 2 sides, R rows.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.engine.world import World
from diffdpo.losses.options import LossOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import PairScores, fold
from diffdpo.scores.reference import Reference
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.backward import gradient_of, replay
from diffdpo.step.report import MicroScores
from diffdpo.step.retry import run_on_all_ranks


def coupled_gradients(
    engine: Engine,
    reference: Reference,
    loss: LossOptions,
    micro_batches: Sequence[PairBatch],
    rows: Sequence[NoisyRows],
    total: torch.Tensor,
    reference_point: torch.Tensor | None,
    segments: Segments,
) -> list[MicroScores]:
    """Add the gradient of the step; the scores of its micro-batches. StepTooLarge on all ranks.

    ``total``: what the summed loss is divided by; ``reference_point``: KTO's, where the loss reads one.
    """

    def score() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        under_reference = [reference(*each) for each in zip(rows, micro_batches, strict=True)]
        return under_reference, [score_rows(engine, each, segments=segments) for each in rows]

    def replay_all() -> None:
        for index, (each, gradient_R) in enumerate(zip(rows, gradients, strict=True)):
            replay(engine, each, gradient_R, segments=segments, last=index == len(rows) - 1)

    reference_f, policy_f = run_on_all_ranks(engine, score)
    weight_B2 = torch.cat([batch.weight_B2 for batch in micro_batches]).to(engine.world.device)
    loss_of = _GlobalLoss(loss, engine.world, weight_B2, rows, reference_f, total, reference_point)
    gradients = gradient_of(loss_of, torch.cat(policy_f)).split([len(each) for each in rows])
    run_on_all_ranks(engine, replay_all)
    # the loss is whole on every rank and for every micro-batch, and reports are added up
    share = loss_of(torch.cat(policy_f)) / (len(rows) * engine.world.size)
    return [MicroScores(*each, share) for each in zip(micro_batches, rows, reference_f, policy_f, strict=True)]


class _GlobalLoss:
    """Row scores of this rank's whole step → the loss of the global step (the same value on every rank)."""

    def __init__(
        self,
        loss: LossOptions,
        world: World,
        weight_B2: torch.Tensor,
        rows: Sequence[NoisyRows],
        reference: Sequence[torch.Tensor],
        total: torch.Tensor,
        reference_point: torch.Tensor | None,
    ):
        self.loss, self.world, self.rows, self.total = loss, world, rows, total
        self.reference_point = reference_point
        self.local = len(weight_B2)
        self.weight_B2 = world.all_gather(weight_B2)
        self.reference = self._all(self._fold(torch.cat(list(reference))))

    def _fold(self, f_R: torch.Tensor) -> PairScores:
        split = f_R.split([len(each) for each in self.rows])
        pieces = [fold(piece_R, each) for piece_R, each in zip(split, self.rows, strict=True)]
        return PairScores(*(torch.cat([getattr(p, item.name) for p in pieces]) for item in fields(PairScores)))

    def _all(self, own: PairScores) -> PairScores:
        """Every rank's scores, with a graph to this rank's own."""
        gathered = [self.world.all_gather(getattr(own, item.name).detach()) for item in fields(PairScores)]
        everything = PairScores(*gathered)
        start = self.world.rank * self.local
        score_B2 = everything.score_B2.clone()
        score_B2[start : start + self.local] = own.score_B2
        return PairScores(score_B2, everything.stderr_B2, everything.tokens_B2)

    def __call__(self, f_R: torch.Tensor) -> torch.Tensor:
        policy = self._all(self._fold(f_R))
        loss_B = self.loss(policy, self.reference, self.weight_B2, reference_point=self.reference_point)
        return loss_B.sum() / self.total
