"""Held-out pairs: does the policy put the chosen answer above the rejected one, and by how much?

Every evaluation uses the same rows (the noise is a function of the records), so a change between two evaluations is a
change of the policy.

Shape suffixes: B pairs, 2 sides, P pairs of all batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.scores.fold import fold
from diffdpo.step.backward import score_rows
from diffdpo.step.reference import Reference
from diffdpo.step.segments import Segments
from diffdpo.step.train_step import NoiseOptions


@dataclass(frozen=True)
class PreferenceReport:
    """One value a held-out pair, in the order of the batches.

    ``margin_P``  β [(S_w - R_w) - (S_l - R_l)], the implicit reward margin.
    ``likelier_P`` 1 where the chosen answer has the higher score per token (no reference involved), else 0.
    """

    margin_P: np.ndarray
    likelier_P: np.ndarray

    @property
    def correct_P(self) -> np.ndarray:
        """1 where the margin is positive, 1/2 where it is 0 (policy and reference agree), else 0."""
        return np.sign(self.margin_P) / 2 + 0.5

    def values(self) -> dict[str, list[float]]:
        """Per pair, by the names of the training metrics. ``loss`` is -log σ(margin)."""
        return {
            "loss": (-logsigmoid(torch.from_numpy(self.margin_P))).tolist(),
            "rewards/accuracies": self.correct_P.tolist(),
            "rewards/margins": self.margin_P.tolist(),
            "scores/accuracies": self.likelier_P.tolist(),
        }


@torch.no_grad()
def evaluate_preferences(
    engine: Engine,
    reference: Reference,
    batches: Sequence[PairBatch],
    noise: NoiseOptions,
    *,
    beta: float,
    segments: Segments,
    limit: int = 0,
) -> PreferenceReport:
    """Score this rank's batches, gather all ranks' (which hold as many, of one size): the first ``limit`` (0: all)."""
    pieces = [torch.zeros(0, 2)]
    for batch in batches:
        rows = noise.rows(batch, engine.world.device)
        policy_R = score_rows(engine, rows, segments=segments)
        policy, ratio = fold(policy_R, rows), fold(policy_R - reference(rows, batch), rows)
        per_token_B2 = policy.score_B2 / policy.tokens_B2.clamp(min=1)
        margin_B = beta * (ratio.score_B2[:, 0] - ratio.score_B2[:, 1])
        likelier_B = (per_token_B2[:, 0] > per_token_B2[:, 1]).float()
        pieces.append(torch.stack([margin_B, likelier_B], 1).cpu())
    table_P2 = _in_order(engine, batches, torch.cat(pieces), [batch.pair_weight_B for batch in batches], limit)
    return PreferenceReport(table_P2[:, 0], table_P2[:, 1])


def _in_order(
    engine: Engine, batches: Sequence[PairBatch], table: torch.Tensor, weights: Sequence[torch.Tensor], limit: int
) -> np.ndarray:
    """Rows of all ranks in the order of the data, whatever the number of ranks; slots of weight 0 left out."""
    world = engine.world
    places = [torch.zeros(0, dtype=torch.int64)]
    for batch in batches:
        size = len(batch.ids)
        places.append((batch.step * world.size + world.rank) * size + torch.arange(size))
    place_P = world.cat(torch.cat(places).to(world.device)).cpu()
    weight_P = world.cat(torch.cat([torch.zeros(0), *weights]).to(world.device)).cpu()
    everything = world.cat(table.to(world.device)).cpu().double()
    order = [p for p in place_P.argsort().tolist() if weight_P[p] > 0]
    return everything[order[: limit or None]].numpy()


@torch.no_grad()
def answer_losses(
    engine: Engine, batches: Sequence[PairBatch], noise: NoiseOptions, *, segments: Segments, limit: int = 0
) -> list[float]:
    """-score / tokens of every chosen answer, over all ranks: what supervised training lowers."""
    pieces = [torch.zeros(0, 1)]
    for batch in batches:
        rows = noise.rows(batch, engine.world.device)
        scores = fold(score_rows(engine, rows, segments=segments), rows)
        pieces.append(-(scores.score_B2 / scores.tokens_B2.clamp(min=1))[:, :1].cpu())
    chosen = [batch.weight_B2[:, 0] for batch in batches]
    return _in_order(engine, batches, torch.cat(pieces), chosen, limit)[:, 0].tolist()
