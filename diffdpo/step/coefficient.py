"""The loss's coefficient dL/dS from other rows than those of the gradient (docs/theory.md, section 5).

The gradient of a loss is  Σ_rows dL/dS · weight · ∇f.  With one set of rows for both factors, noise of the scores S in
dL/dS meets the same noise in ∇S, a bias. Further rows, independent of the gradient's, need no graph, so each costs one
forward where a row of the gradient costs three or four.

Shape suffixes: R rows, B pairs, 2 sides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import PairScores, fold

KINDS = ("same", "other", "all")


@dataclass(frozen=True)
class CoefficientRows:
    """Which rows dL/dS is taken from: the gradient's (``same``), ``num_samples`` ``other`` ones, or ``all`` of them."""

    kind: str = "same"
    num_samples: int = 0

    def share_of_own(self, own_samples: int) -> float:
        """Weight of the gradient's own rows in the score that the coefficient is taken at."""
        return own_samples / (own_samples + self.num_samples) if self.kind == "all" else 0.0


def mixed(own: PairScores, other: PairScores, share: float) -> PairScores:
    """``share`` of one estimate and the rest of the other: unbiased, as both are; detached."""
    return replace(own, score_B2=torch.lerp(other.score_B2, own.score_B2.detach(), share))


def linearised(
    loss: Callable[[PairScores, PairScores], torch.Tensor],
    rows: NoisyRows,
    *,
    reference: PairScores,
    other: tuple[PairScores, PairScores],
    share: float,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """f_R of the gradient's rows → the loss at the mixed scores, whose gradient is dL/dS there times ∇S of the rows.

    ``loss(policy, reference)`` is the micro-batch's share of the loss; ``other``: (policy, reference) scores from the
    further rows.
    """
    at_reference = mixed(reference, other[1], share)

    def loss_of(f_R: torch.Tensor) -> torch.Tensor:
        own = fold(f_R, rows)
        with torch.enable_grad():
            at = mixed(own, other[0], share)
            leaf_B2 = at.score_B2.detach().requires_grad_()
            value = loss(replace(at, score_B2=leaf_B2), at_reference)
            slope_B2 = torch.autograd.grad(value, leaf_B2)[0]
        return value.detach() + (slope_B2 * (own.score_B2 - own.score_B2.detach())).sum()

    return loss_of
