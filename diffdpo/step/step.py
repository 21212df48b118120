"""One optimizer step of preference training, in the order of the data flow.

micro-batches → noisy rows → reference scores → policy scores and gradients by segments → optimizer → StepReport

Losses are sums over pairs divided by the real pairs of the global step, counted over all ranks beforehand.

Shape suffixes: B pairs, 2 sides, R rows.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.losses.metrics import SUMS, means, pair_sums
from diffdpo.losses.preference import LOSSES, loss_count, preference_loss
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.reference import Reference, no_reference
from diffdpo.scores.allocate import next_num_samples
from diffdpo.scores.fold import PairScores, fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.step.backward import STRATEGIES, Backward, LossOf, gradient_of, replay
from diffdpo.step.coefficient import CoefficientRows, linearised
from diffdpo.step.kto import reference_point
from diffdpo.step.retry import StepTooLarge, halve_segments, run_on_all_ranks
from diffdpo.scores.segments import Segments


@dataclass(frozen=True)
class LossOptions:
    """``--loss_type`` and what goes with it."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def describe(self) -> str:
        """For the user: names, with their weights where these are not 1."""
        both = zip(self.names, self.weights, strict=True)
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in both)

    @property
    def sft_weight(self) -> float:
        """Weight of ``sft`` beside another loss; 0 where there is none."""
        return dict(zip(self.names, self.weights, strict=True)).get("sft", 0.0) if len(self.names) > 1 else 0.0

    def without_sft(self) -> "LossOptions":
        """The preference loss alone; ``sft`` where there is nothing else."""
        kept = [(name, w) for name, w in zip(self.names, self.weights, strict=True) if name != "sft"]
        if not kept:
            return self
        names, weights = zip(*kept, strict=True)
        return replace(self, names=names, weights=weights)

    def sft_alone(self) -> "LossOptions":
        """The sft term with its weight."""
        return replace(self, names=("sft",), weights=(self.sft_weight,))

    @property
    def unpaired(self) -> bool:
        """Whether a loss takes answers one by one, so that records need not be pairs."""
        return any(LOSSES[name].scope == "answer" for name in self.names)

    @property
    def couples_pairs(self) -> bool:
        """Whether the scores of all pairs of the global step must be known before any loss."""
        return self.needs_kl or any(LOSSES[name].scope == "batch" for name in self.names)

    @property
    def needs_kl(self) -> bool:
        """Whether the reference point z must be measured at every step."""
        return any(LOSSES[name].needs_kl for name in self.names)

    def __call__(
        self, policy: PairScores, reference: PairScores, weight_B2: torch.Tensor, *, kl: torch.Tensor | None = None
    ) -> torch.Tensor:
        """loss_B."""
        return preference_loss(
            self.names,
            policy_B2=policy.score_B2,
            reference_B2=reference.score_B2,
            tokens_B2=policy.tokens_B2,
            weight_B2=weight_B2,
            weights=list(self.weights),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            simpo_gamma=self.simpo_gamma,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            kl=kl,
        )


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself, over all ranks. ``sums`` add up over steps; see ``losses.metrics``."""

    loss: float  # without the sft term: what is ln 2 at the start and comparable between runs
    sft_loss: float | None  # the sft term with its weight, where it stands beside another loss
    grad_norm: float
    sums: torch.Tensor
    tokens: int  # run through the policy, padding not counted
    records: int  # pairs (or single answers, for losses of those) the loss is the mean over
    largest_logit: float  # max |h| / β over pairs
    num_samples: int  # n of this step
    reference_point: float | None = None  # z of kto, nats
    computed_tokens: int = 0  # through the policy in all forwards of the step, padding included ...
    padding_tokens: int = 0  # ... and the padding among them
    segment_rows: int = 0  # size of a segment, where it is a number of rows,
    segment_tokens: int = 0  # or of tokens
    notes: tuple[str, ...] = ()  # what the user should be told


@dataclass(frozen=True)
class MicroScores:
    """A micro-batch after scoring; all without a graph."""

    batch: PairBatch
    rows: NoisyRows
    reference_R: torch.Tensor
    policy_R: torch.Tensor
    loss: torch.Tensor


class PreferenceStep:
    """``step(micro_batches, learning_rate)`` → StepReport.

    With ``target_stderr`` each step chooses the next one's n, at most that of ``noise``; ``state_dict`` then has what a
    resumed run must know.
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
        max_length: int | None = None,
        target_stderr: float | None = None,
        coefficient: CoefficientRows | None = None,
    ):
        self.engine, self.reference, self.noise, self.loss = engine, reference, noise, loss
        self.coefficient = coefficient or CoefficientRows()
        self.strategy, self.segments = strategy, segments
        if engine.retry_obstacle() is None:
            segments.world = None  # nothing is reduced before the end: ranks may differ, and must not ask meanwhile
        self.max_length = max_length  # of rows joined from two records (kto)
        self.target_stderr, self.most_samples = target_stderr, noise.num_samples

    def __call__(self, micro_batches: Sequence[PairBatch], learning_rate: float) -> StepReport:
        world = self.engine.world
        count = sum(loss_count(self.loss.names, batch.weight_B2) for batch in micro_batches)
        total = world.all_reduce_sum(torch.as_tensor(count, device=world.device).double()).clamp(min=1).float()
        notes: list[str] = []
        while True:
            try:
                kl, scored = self._gradients(micro_batches, total)
                break
            except StepTooLarge as failure:
                self.engine.abort_step()
                notes.append(halve_segments(self.engine, self.segments, failure))
                self.strategy = "two_pass" if self.strategy == "none" else self.strategy
        norm = self.engine.step(learning_rate)
        report = replace(self._report(scored, norm, int(total), kl), notes=tuple(notes))
        self._choose_samples(report)
        return report

    def _gradients(
        self, micro_batches: Sequence[PairBatch], total: torch.Tensor
    ) -> tuple[torch.Tensor | None, list[MicroScores]]:
        """Add the gradient of the step; (KTO's reference point, the scores). StepTooLarge on all ranks."""
        kl = self._reference_point(micro_batches)
        with self.engine.no_sync() if self._waits() else nullcontext():
            try:
                if self.loss.couples_pairs:
                    return kl, self._coupled(micro_batches, total, kl)
                return kl, run_on_all_ranks(self.engine, lambda: self._independent(micro_batches, total))
            except StepTooLarge:
                self.engine.abort_step()  # or the end of the block would reduce what there is
                raise

    def _waits(self) -> bool:
        """Whether gradients are reduced at the end of the step: always where that costs nothing, as ranks can then
        fail and repeat together."""
        return self.strategy == "deferred" or (self.engine.world.size > 1 and self.engine.retry_obstacle() is None)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides model, data and settings."""
        return {"num_samples": self.noise.num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; settings that are fixed stay as they are."""
        if self.target_stderr is not None:
            self.noise = replace(self.noise, num_samples=min(state["num_samples"], self.most_samples))

    def _choose_samples(self, report: StepReport) -> None:
        """n of the next step from the standard error of this one's rewards β r, the same on every rank."""
        if self.target_stderr is None:
            return
        stderr = self.loss.beta * means(report.sums).get("noise/ratio_stderr", float("nan"))
        n = next_num_samples(
            self.noise.num_samples, stderr=stderr, target=self.target_stderr, maximum=self.most_samples
        )
        # the sums are equal on all ranks, but ranks that ran different numbers of rows would wait for ever
        self.noise = replace(self.noise, num_samples=self.engine.world.broadcast(n))

    def _independent(self, micro_batches: Sequence[PairBatch], total: torch.Tensor) -> list[MicroScores]:
        """The loss of a pair depends on that pair alone: one micro-batch after the other."""
        scored = []
        for index, batch in enumerate(micro_batches):
            rows = self.noise.rows(batch, self.engine.world.device)
            reference_R = self.reference(rows, batch)
            loss_of = self._loss_of(rows, batch, reference_R, total)
            policy_R = self._backward_of(rows)(
                self.engine,
                rows,
                loss_of,
                segments=self.segments,
                last=index == len(micro_batches) - 1,
            )
            scored.append(MicroScores(batch, rows, reference_R, policy_R, loss_of(policy_R)))
        return scored

    def _backward_of(self, rows: NoisyRows) -> Backward:
        """The run's strategy; one graph where a single segment holds the micro-batch: no more memory than that segment,
        and no row computed twice."""
        at_once = self.strategy in ("checkpoint", "two_pass") and self.segments.one(rows)
        return STRATEGIES["none" if at_once else self.strategy]

    def _loss_of(self, rows: NoisyRows, batch: PairBatch, reference_R: torch.Tensor, total: torch.Tensor) -> LossOf:
        reference, weight_B2 = fold(reference_R, rows), batch.weight_B2.to(reference_R.device)

        def of(loss: LossOptions) -> Callable[[PairScores, PairScores], torch.Tensor]:
            return lambda policy, reference: loss(policy, reference, weight_B2).sum() / total

        if self.coefficient.kind == "same":
            return lambda f_R: of(self.loss)(fold(f_R, rows), reference)
        share, other = self.coefficient.share_of_own(self.noise.num_samples), self._further_scores(batch)
        preference = linearised(of(self.loss.without_sft()), rows, reference=reference, other=other, share=share)
        if not self.loss.sft_weight:
            return preference
        sft = of(self.loss.sft_alone())  # linear in the score: its coefficient needs no rows
        return lambda f_R: preference(f_R) + sft(fold(f_R, rows), reference)

    def _further_scores(self, batch: PairBatch) -> tuple[PairScores, PairScores]:
        """(policy, reference) scores from rows of the coefficient alone."""
        noise = replace(self.noise, num_samples=self.coefficient.num_samples)
        rows = noise.rows(batch, self.engine.world.device, draw=1)
        return fold(score_rows(self.engine, rows, segments=self.segments), rows), fold(
            self.reference(rows, batch), rows
        )

    def _coupled(
        self, micro_batches: Sequence[PairBatch], total: torch.Tensor, kl: torch.Tensor | None
    ) -> list[MicroScores]:
        """The loss needs all pairs of the step: scores of all ranks first, then every rank replays its own rows."""
        device = self.engine.world.device
        rows = [self.noise.rows(batch, device) for batch in micro_batches]
        reference, policy = run_on_all_ranks(self.engine, lambda: self._scores(rows, micro_batches))
        loss_of = _GlobalLoss(self.loss, self.engine, micro_batches, rows, reference, total, kl)
        gradients = gradient_of(loss_of, torch.cat(policy)).split([len(each) for each in rows])

        def replay_all() -> None:
            for index, (each, gradient_R) in enumerate(zip(rows, gradients, strict=True)):
                replay(self.engine, each, gradient_R, segments=self.segments, last=index == len(rows) - 1)

        run_on_all_ranks(self.engine, replay_all)
        share = loss_of(torch.cat(policy)) / (len(rows) * self.engine.world.size)  # _report adds up what is whole here
        return [MicroScores(*each, share) for each in zip(micro_batches, rows, reference, policy, strict=True)]

    def _scores(
        self, rows: Sequence[NoisyRows], micro_batches: Sequence[PairBatch]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """f_R of each micro-batch under reference and policy."""
        reference = [self.reference(*each) for each in zip(rows, micro_batches, strict=True)]
        return reference, [score_rows(self.engine, each, segments=self.segments) for each in rows]

    def _reference_point(self, micro_batches: Sequence[PairBatch]) -> torch.Tensor | None:
        """z of ``kto`` over the global step; None for other losses."""
        if not self.loss.needs_kl:
            return None
        return reference_point(
            self.engine,
            self.reference,
            lambda batch: self.noise.rows(batch, self.engine.world.device),
            micro_batches,
            segments=self.segments,
            max_length=self.max_length,
        )

    def _report(self, scored: Sequence[MicroScores], norm: float, records: int, kl: torch.Tensor | None) -> StepReport:
        world, sums, largest = self.engine.world, torch.zeros(len(SUMS), dtype=torch.float64), 0.0
        supervised = 0.0
        for micro in scored:
            policy, reference = fold(micro.policy_R, micro.rows), fold(micro.reference_R, micro.rows)
            ratio = fold(micro.policy_R - micro.reference_R, micro.rows)
            sums += pair_sums(
                policy.score_B2,
                None if self.reference is no_reference else reference.score_B2,
                tokens_B2=policy.tokens_B2,
                weight_B2=micro.batch.weight_B2.to(world.device),
                beta=self.loss.beta,
                stderr_B2=policy.stderr_B2,
                ratio_stderr_B2=ratio.stderr_B2,
            ).cpu()
            if self.loss.sft_weight:
                weight_B2 = micro.batch.weight_B2.to(world.device)
                sft_B = self.loss.sft_alone()(policy, reference, weight_B2)
                supervised += float(sft_B.sum()) / max(1, records)
            logit_B = (ratio.score_B2[:, 0] - ratio.score_B2[:, 1]).abs()
            largest = max(largest, float(logit_B.max()))
        largest = float(world.all_gather(torch.tensor([largest], device=world.device)).max())
        tokens = sum(int(m.rows.lengths_R.sum()) for m in scored)
        computed, padding = self._computed()
        loss = sum(float(m.loss) for m in scored)
        extra = torch.tensor([computed, padding, supervised, loss, tokens], dtype=torch.float64)
        whole = world.all_reduce_sum(torch.cat([sums, extra]).to(world.device)).cpu()
        sft_loss = float(whole[-3]) if self.loss.sft_weight else None
        return StepReport(
            loss=float(whole[-2] - whole[-3]),
            sft_loss=sft_loss,
            grad_norm=norm,
            sums=whole[:-5],
            tokens=int(whole[-1]),
            records=records,
            largest_logit=largest,
            num_samples=self.noise.num_samples,
            reference_point=None if kl is None else float(kl),
            computed_tokens=int(whole[-5]),
            padding_tokens=int(whole[-4]),
            segment_rows=self.segments.rows,
            segment_tokens=self.segments.tokens,
        )

    def _computed(self) -> tuple[int, int]:
        """(tokens, padding among them) that this rank's policy has run since the last call."""
        counted = cast(MaskedLogProbs, self.engine.module).counted
        found = counted.computed, counted.padding
        counted.computed = counted.padding = 0
        return found


class _GlobalLoss:
    """Row scores of this rank's whole step → the loss of the global step (the same value on every rank)."""

    def __init__(
        self,
        loss: LossOptions,
        engine: Engine,
        micro_batches: Sequence[PairBatch],
        rows: Sequence[NoisyRows],
        reference: Sequence[torch.Tensor],
        total: torch.Tensor,
        kl: torch.Tensor | None,
    ):
        self.loss, self.world, self.rows, self.total, self.kl = loss, engine.world, rows, total, kl
        weight_B2 = torch.cat([batch.weight_B2 for batch in micro_batches]).to(engine.world.device)
        self.local = len(weight_B2)
        self.weight_B2 = self.world.all_gather(weight_B2)
        self.reference = self._all(self._fold(torch.cat(list(reference))))

    def _fold(self, f_R: torch.Tensor) -> PairScores:
        pieces = [
            fold(piece_R, each)
            for piece_R, each in zip(f_R.split([len(each) for each in self.rows]), self.rows, strict=True)
        ]
        return PairScores(*(torch.cat([getattr(p, name) for p in pieces]) for name in PairScores.__annotations__))

    def _all(self, own: PairScores) -> PairScores:
        """Every rank's scores, with a graph to this rank's own."""
        everything = PairScores(*(self.world.all_gather(getattr(own, name).detach()) for name in PairScores.__annotations__))
        start = self.world.rank * self.local
        score_B2 = everything.score_B2.clone()
        score_B2[start : start + self.local] = own.score_B2
        return PairScores(score_B2, everything.stderr_B2, everything.tokens_B2)

    def __call__(self, f_R: torch.Tensor) -> torch.Tensor:
        policy = self._all(self._fold(f_R))
        return self.loss(policy, self.reference, self.weight_B2, kl=self.kl).sum() / self.total
