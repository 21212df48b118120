"""Held-out records under policy and reference: does the policy prefer what it should, and by how much?

Every evaluation uses the same rows (the noise is a function of the records), so a change between two evaluations is a
change of the policy.

Shape suffixes: B records, 2 sides, P records of all batches and ranks, D desirable and U undesirable answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.losses.options import LossOptions
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import PairScores, fold
from diffdpo.scores.reference import Reference
from diffdpo.scores.rounding import preferred, size_of
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.kto import reference_point
from diffdpo.step.retry import repeated, run_on_all_ranks


@dataclass(frozen=True)
class ScoreTable:
    """Scores of held-out records, float64 on the CPU, by record number; ``weight_P2`` is 0 for absent sides.

    ``reference_point`` is z of ``kto`` over these records, None for other losses.
    """

    policy_P2: Tensor
    reference_P2: Tensor
    tokens_P2: Tensor
    weight_P2: Tensor
    reference_point: Tensor | None = None

    def values(self, loss: LossOptions) -> dict[str, list[float]]:
        """One value an item, by the names of the training metrics (docs/losses.md); names without an item left out."""
        reward_P2 = loss.beta * (self.policy_P2 - self.reference_P2)
        per_token_P2 = self.policy_P2 / self.tokens_P2.clamp(min=1)
        pair_P = self.weight_P2.prod(1) > 0
        margin_P, gap_P = (side_P2[pair_P, 0] - side_P2[pair_P, 1] for side_P2 in (reward_P2, per_token_P2))
        size_P = size_of(self.policy_P2, self.tokens_P2)[pair_P]
        found = {"loss": self.losses(loss)}
        if pair_P.any():
            found |= {
                # 1/2 where policy and reference agree
                "rewards/accuracies": preferred(margin_P / loss.beta, size_P).tolist(),
                "rewards/margins": margin_P.tolist(),
                "scores/accuracies": (gap_P.sign() / 2 + 0.5).tolist(),
            }
        if (self.weight_P2.sum(1) == 1).any():
            chosen_D, rejected_U = (reward_P2[self.weight_P2[:, side] > 0, side] for side in (0, 1))
            found |= {
                "rewards/chosen": chosen_D.tolist(),
                "rewards/rejected": rejected_U.tolist(),
                "rewards/separation": separation(chosen_D.numpy(), rejected_U.numpy()).tolist(),
            }
        return {name: values for name, values in found.items() if values}

    def losses(self, loss: LossOptions) -> list[float]:
        """The run's loss without its sft term, one value a pair, or an answer for losses of answers.

        ``aot`` sorts over the held-out records as one batch: of its values only the mean has a meaning.
        """
        alone = loss.without_sft()
        if not alone.unpaired:
            present_P = self.weight_P2[:, 0] > 0 if alone.names == ("sft",) else self.weight_P2.prod(1) > 0
            return self._loss(alone, self.weight_P2)[present_P].tolist()
        sides = []
        for side in (0, 1):
            present_P2 = torch.zeros_like(self.weight_P2)
            present_P2[:, side] = self.weight_P2[:, side]
            sides.append(self._loss(alone, present_P2)[present_P2[:, side] > 0])
        return torch.cat(sides).tolist()

    def _loss(self, loss: LossOptions, weight_P2: Tensor) -> Tensor:
        unknown_P2 = torch.zeros_like(self.policy_P2)
        policy, reference = (
            PairScores(score_P2, unknown_P2, self.tokens_P2) for score_P2 in (self.policy_P2, self.reference_P2)
        )
        return loss(policy, reference, weight_P2, reference_point=self.reference_point)


def separation(chosen_D: np.ndarray, rejected_U: np.ndarray) -> np.ndarray:
    """[D + U] values whose mean is AUC = P(reward of a desirable answer > that of an undesirable one), ties as 1/2.

    It needs no threshold and no pairs; 1/2 is chance. The values are AUC plus each answer's influence on it, so that
    their standard error of the mean is that of DeLong et al. (Biometrics 44, 1988) to order 1 / (D + U), also for the
    change between two evaluations. Empty where one kind of answer is missing.
    """
    count_d, count_u = len(chosen_D), len(rejected_U)
    if not count_d or not count_u:
        return np.zeros(0)
    above_D = _share_below(chosen_D, rejected_U)
    below_U = 1 - _share_below(rejected_U, chosen_D)
    auc, total = above_D.mean(), count_d + count_u
    return auc + np.concatenate([(above_D - auc) * total / count_d, (below_U - auc) * total / count_u])


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the share of ``others`` below it, equal ones counting half."""
    ordered = np.sort(others)
    ends = [np.searchsorted(ordered, values, side=side) for side in ("left", "right")]
    return (ends[0] + ends[1]) / (2 * len(others))


@torch.no_grad()
def score_held_out(
    engine: Engine,
    reference: Reference,
    batches: Sequence[PairBatch],
    noise: NoiseOptions,
    loss: LossOptions,
    *,
    segments: Segments,
    max_length: int | None = None,
) -> ScoreTable:
    """Score this rank's batches and gather all ranks' (which hold as many, of one size).

    A function of the records: the number of ranks and the size of a batch move a figure by rounding alone.
    """

    def rows_of(batch: PairBatch) -> NoisyRows:
        return noise.draw_rows(batch, engine.world.device)

    def table(batch: PairBatch) -> Tensor:
        rows = rows_of(batch)
        policy = fold(score_rows(engine, rows, segments=segments), rows)
        reference_B2 = fold(reference(rows, batch), rows).score_B2
        columns = (policy.score_B2, reference_B2, policy.tokens_B2.float(), batch.weight_B2.to(reference_B2))
        return torch.stack(columns, 1).cpu()

    def point() -> Tensor:
        return reference_point(
            engine, reference, rows_of, batches, segments=segments, max_length=max_length, training=False
        ).cpu()

    pieces = [torch.zeros(0, 4, 2), *_each(engine, table, batches, segments)]
    z = repeated(engine, point, segments=segments).double() if loss.needs_reference_point else None
    weights = [batch.weight_B2.amax(1) for batch in batches]
    table_P42 = torch.from_numpy(_in_order(engine, batches, torch.cat(pieces), weights))
    policy_P2, reference_P2, tokens_P2, weight_P2 = table_P42.unbind(1)
    return ScoreTable(policy_P2, reference_P2, tokens_P2, weight_P2, z)


def _each(
    engine: Engine, score: Callable[[PairBatch], Tensor], batches: Sequence[PairBatch], segments: Segments
) -> Iterator[Tensor]:
    """``score`` of every batch, of one that is too large in smaller segments from its beginning: policy and reference
    in the same ones, so that they agree to the bit where they are the same."""
    for batch in batches:
        work = partial(run_on_all_ranks, engine, partial(score, batch), graph=False)
        yield repeated(engine, work, segments=segments)


def _in_order(
    engine: Engine, batches: Sequence[PairBatch], table: torch.Tensor, weights: Sequence[torch.Tensor]
) -> np.ndarray:
    """Rows of all ranks by record number; slots of weight 0 left out.

    Not by place: a step is sorted by length and dealt over the ranks, so a record's place follows from the batch, and
    items of two evaluations are compared one by one.
    """
    world = engine.world
    numbers = torch.tensor([number for batch in batches for number in batch.records], dtype=torch.int64)
    number_P = world.all_gather(numbers.to(world.device)).cpu()
    weight_P = world.all_gather(torch.cat([torch.zeros(0), *weights]).to(world.device)).cpu()
    everything = world.all_gather(table.to(world.device)).cpu().double()
    order = [p for p in number_P.argsort().tolist() if weight_P[p] > 0]
    return everything[order].numpy()


@torch.no_grad()
def answer_losses(
    engine: Engine, batches: Sequence[PairBatch], noise: NoiseOptions, *, segments: Segments
) -> list[float]:
    """-score / tokens of every chosen answer, over all ranks: what supervised training lowers."""

    def losses(batch: PairBatch) -> Tensor:
        rows = noise.draw_rows(batch, engine.world.device)
        scores = fold(score_rows(engine, rows, segments=segments), rows)
        return -(scores.score_B2 / scores.tokens_B2.clamp(min=1))[:, :1].cpu()

    pieces = [torch.zeros(0, 1), *_each(engine, losses, batches, segments)]
    chosen = [batch.weight_B2[:, 0] for batch in batches]
    return _in_order(engine, batches, torch.cat(pieces), chosen)[:, 0].tolist()
