"""One optimizer step of preference training, in the order of the data flow.

micro-batches → noisy rows → reference scores → policy scores and gradients by segments → optimizer → StepReport

Losses are sums over pairs divided by the real pairs of the global step, counted over all ranks beforehand. Losses that
couple the pairs of a step are taken in ``step.coupled``.

Shape suffixes: B pairs, 2 sides, R rows.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.losses.options import LossOptions
from diffdpo.losses.preference import loss_count
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import fold
from diffdpo.scores.reference import Reference, timed_reference
from diffdpo.scores.segments import Segments
from diffdpo.step.backward import STRATEGIES, Backward, LossOf
from diffdpo.step.coupled import coupled_gradients
from diffdpo.step.kto import reference_point
from diffdpo.step.report import MicroScores, StepReport, report_of
from diffdpo.step.retry import StepTooLarge, halve_segments, run_on_all_ranks


class PreferenceStep:
    """``step(micro_batches, learning_rate)`` → StepReport.

    ``compared``: whether there is a reference (its scores are 0 otherwise). ``max_length``: of rows joined by kto.
    ``reference_forwards``: of the reference model in a step, 0 or 1; for the report of work done.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Reference,
        noise: NoiseOptions,
        loss: LossOptions,
        *,
        strategy: str,
        segments: Segments,
        compared: bool = True,
        max_length: int | None = None,
        reference_forwards: int = 0,
    ):
        self.engine, self.noise, self.loss = engine, noise, loss
        self.reference = timed_reference(reference, engine.world.clock)
        self.strategy, self.segments = strategy, segments
        segments.answers_apart = strategy == "deferred"  # for the reference too: equal models differ by 0 to the bit
        self.compared, self.max_length, self.reference_forwards = compared, max_length, reference_forwards

    def __call__(self, micro_batches: Sequence[PairBatch], learning_rate: float) -> StepReport:
        world = self.engine.world
        count = sum(loss_count(self.loss.names, batch.weight_B2) for batch in micro_batches)
        whole = world.all_reduce_sum(torch.as_tensor(count, device=world.device).double())
        total = whole.clamp(min=1).float()  # a step without a pair has a gradient of 0 / 1, not 0 / 0
        notes: list[str] = []
        while True:
            try:
                point, scored = self._gradients(micro_batches, total)
                break
            except StepTooLarge as failure:
                self.engine.abort_step()  # all of it: what a broken backward left cannot be told from the rest
                notes.append(halve_segments(self.engine, self.segments, failure))
                self.strategy = "two_pass" if self.strategy == "none" else self.strategy
        report = report_of(
            scored,
            engine=self.engine,
            loss=self.loss,
            compared=self.compared,
            grad_norm=self.engine.step(learning_rate),
            records=int(whole),
            reference_point=point,
            reference_forwards=self.reference_forwards,
        )
        return replace(
            report,
            num_samples=self.noise.num_samples,
            segment_rows=self.segments.rows,
            segment_tokens=self.segments.tokens,
            notes=tuple(notes),
        )

    def _gradients(
        self, micro_batches: Sequence[PairBatch], total: torch.Tensor
    ) -> tuple[torch.Tensor | None, list[MicroScores]]:
        """Add the gradient of the step; (KTO's reference point, the scores). StepTooLarge on all ranks."""
        point = self._reference_point(micro_batches)
        with self.engine.no_sync() if self._waits() else nullcontext():
            try:
                if self.loss.couples_pairs:
                    scored = self._coupled(micro_batches, total, point)
                else:
                    scored = run_on_all_ranks(self.engine, lambda: self._independent(micro_batches, total))
                return point, scored
            except StepTooLarge:
                self.engine.abort_step()  # or the end of the block would reduce what there is
                raise

    def _coupled(
        self, micro_batches: Sequence[PairBatch], total: torch.Tensor, point: torch.Tensor | None
    ) -> list[MicroScores]:
        rows = [self._rows(batch) for batch in micro_batches]
        how = (self.engine, self.reference, self.loss, micro_batches, rows, total, point, self.segments)
        return coupled_gradients(*how)

    def _rows(self, batch: PairBatch) -> NoisyRows:
        with self.engine.world.clock.phase("noise"):
            return self.noise.draw_rows(batch, self.engine.world.device)

    def _waits(self) -> bool:
        """Whether gradients are reduced at the end of the step: where that is free, so that ranks can repeat it."""
        return self.strategy == "deferred" or (self.engine.world.size > 1 and self.engine.retry_obstacle() is None)

    def _independent(self, micro_batches: Sequence[PairBatch], total: torch.Tensor) -> list[MicroScores]:
        """The loss of a pair depends on that pair alone: one micro-batch after the other."""
        scored = []
        for index, batch in enumerate(micro_batches):
            rows = self._rows(batch)
            reference_R = self.reference(rows, batch)
            loss_of = self._loss_of(rows, batch, reference_R, total)
            backward, last = self._backward_of(rows), index == len(micro_batches) - 1
            policy_R = backward(self.engine, rows, loss_of, segments=self.segments, last=last)
            scored.append(MicroScores(batch, rows, reference_R, policy_R, loss_of(policy_R)))
        return scored

    def _backward_of(self, rows: NoisyRows) -> Backward:
        """The run's strategy; one graph where a single segment holds the micro-batch, so that no row runs twice."""
        at_once = self.strategy in ("checkpoint", "two_pass") and self.segments.one(rows)
        return STRATEGIES["none" if at_once else self.strategy]

    def _loss_of(self, rows: NoisyRows, batch: PairBatch, reference_R: torch.Tensor, total: torch.Tensor) -> LossOf:
        reference, weight_B2 = fold(reference_R, rows), batch.weight_B2.to(reference_R.device)
        return lambda f_R: self.loss(fold(f_R, rows), reference, weight_B2).sum() / total

    def _reference_point(self, micro_batches: Sequence[PairBatch]) -> torch.Tensor | None:
        """z of ``kto`` over the global step; None for other losses."""
        if not self.loss.needs_reference_point:
            return None
        how = (self.engine, self.reference, self._rows, micro_batches)
        return reference_point(*how, segments=self.segments, max_length=self.max_length)
