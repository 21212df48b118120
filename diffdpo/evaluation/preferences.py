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
    segment_rows: int,
) -> PreferenceReport:
    """Score this rank's batches, gather all ranks'. Every rank must hold as many batches of the same size."""
    pieces = [torch.zeros(0, 3)]
    for batch in batches:
        rows = noise.rows(batch, engine.world.device)
        policy_R = score_rows(engine, rows, segment_rows=segment_rows)
        policy, ratio = fold(policy_R, rows), fold(policy_R - reference(rows), rows)
        per_token_B2 = policy.score_B2 / policy.tokens_B2.clamp(min=1)
        margin_B = beta * (ratio.score_B2[:, 0] - ratio.score_B2[:, 1])
        likelier_B = (per_token_B2[:, 0] > per_token_B2[:, 1]).float()
        pieces.append(torch.stack([margin_B, likelier_B, batch.pair_weight_B.to(margin_B.device)], 1).cpu())
    table_P3 = engine.world.cat(torch.cat(pieces).to(engine.world.device)).cpu().double().numpy()
    table_P3 = table_P3[table_P3[:, 2] > 0]
    return PreferenceReport(table_P3[:, 0], table_P3[:, 1])


@torch.no_grad()
def answer_losses(
    engine: Engine, batches: Sequence[PairBatch], noise: NoiseOptions, *, segment_rows: int
) -> list[float]:
    """-score / tokens of every chosen answer, over all ranks: what supervised training lowers."""
    pieces = [torch.zeros(0, 2)]
    for batch in batches:
        rows = noise.rows(batch, engine.world.device)
        scores = fold(score_rows(engine, rows, segment_rows=segment_rows), rows)
        loss_B = -(scores.score_B2 / scores.tokens_B2.clamp(min=1))[:, 0].cpu()
        pieces.append(torch.stack([loss_B, batch.weight_B2[:, 0]], 1))
    table_P2 = engine.world.cat(torch.cat(pieces).to(engine.world.device)).cpu()
    return table_P2[table_P2[:, 1] > 0, 0].tolist()
