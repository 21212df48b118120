"""The objective of a run as one value: a weighted sum of losses of score vectors. No torch is imported in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffdpo.losses.preference import LOSSES, preference_loss

if TYPE_CHECKING:
    from torch import Tensor

    from diffdpo.scores.fold import PairScores


@dataclass(frozen=True)
class LossOptions:
    """``--loss_type`` and what goes with it. ``parameters``: the losses' own; what is left out is at its default.
    ``divergence``, with its coefficient, and ``use_weighting``: see ``losses.divergence``."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    parameters: Mapping[str, float] = field(default_factory=dict)
    divergence: str = "reverse_kl"
    divergence_coefficient: float = 1.0
    use_weighting: bool = False

    def describe(self) -> str:
        """For the user: names, with their weights where these are not 1."""
        both = zip(self.names, self.weights, strict=True)
        text = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in both)
        text += f" under {self.divergence}" if self.divergence != "reverse_kl" else ""
        return text + (", weighted (WPO)" if self.use_weighting else "")

    @property
    def sft_weight(self) -> float:
        """Weight of ``sft`` beside another loss; 0 where there is none."""
        return dict(zip(self.names, self.weights, strict=True)).get("sft", 0.0) if len(self.names) > 1 else 0.0

    def without_sft(self) -> LossOptions:
        """The preference loss alone; ``sft`` where there is nothing else."""
        kept = [(name, w) for name, w in zip(self.names, self.weights, strict=True) if name != "sft"]
        if not kept:
            return self
        names, weights = zip(*kept, strict=True)
        return replace(self, names=names, weights=weights)

    def sft_alone(self) -> LossOptions:
        """The sft term with its weight."""
        return replace(self, names=("sft",), weights=(self.sft_weight,))

    @property
    def unpaired(self) -> bool:
        """Whether a loss takes answers one by one, so that records need not be pairs."""
        return any(LOSSES[name].scope == "answer" for name in self.names)

    @property
    def couples_pairs(self) -> bool:
        """Whether the scores of all pairs of the global step must be known before any loss."""
        return self.needs_reference_point or any(LOSSES[name].scope == "batch" for name in self.names)

    @property
    def needs_reference_point(self) -> bool:
        """Whether KTO's reference point z must be measured at every step."""
        return any(LOSSES[name].needs_reference_point for name in self.names)

    @property
    def reference_free(self) -> bool:
        """Whether no loss reads the reference's scores."""
        return all(LOSSES[name].reference_free for name in self.names)

    def __call__(
        self,
        policy: PairScores,
        reference: PairScores,
        weight_B2: Tensor,
        *,
        reference_point: Tensor | None = None,
    ) -> Tensor:
        """loss_B."""
        return preference_loss(
            self.names,
            policy_B2=policy.score_B2,
            reference_B2=reference.score_B2,
            tokens_B2=policy.tokens_B2,
            weight_B2=weight_B2,
            weights=list(self.weights),
            beta=self.beta,
            reference_point=reference_point,
            divergence=self.divergence,
            divergence_coefficient=self.divergence_coefficient,
            use_weighting=self.use_weighting,
            **self.parameters,
        )
