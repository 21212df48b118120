"""The objective: which losses, with which weights and parameters."""

import math
from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.losses.options import LossOptions
from diffdpo.losses.preference import DEFAULTS, LOSSES, LossParameters, check_loss, check_read
from diffdpo.settings.base import setting


@dataclass(frozen=True, kw_only=True)
class LossSettings(LossParameters):
    """The preference loss. Its own parameters are declared beside the losses."""

    title: ClassVar[str] = "loss"

    beta: float = setting(0.1, "strength of the pull towards the reference", above=0, common=True)
    loss_type: str = setting(
        "sigmoid",
        "one loss, or several that are added; see docs/losses.md",
        known=tuple(LOSSES),
        many=True,
        common=True,
    )
    loss_weights: str | None = setting(None, "one weight per loss; default: 1 each", many=True)
    sft_weight: float = setting(0.0, "adds -sft_weight * score(chosen) / tokens(chosen)", at_least=0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of ``loss_type``."""
        return tuple(name.strip() for name in self.loss_type.split(","))

    def check(self) -> None:
        """Names, weights and parameters that contradict one another, or that no loss reads."""
        loss = self.loss()
        if loss.unpaired and self.desirable_weight == self.undesirable_weight == 0:
            raise UserError(
                "--desirable_weight and --undesirable_weight are both 0: the loss would be 0 whatever is answered; "
                "make one of them larger"
            )

    def loss(self) -> LossOptions:
        """All of it as one sum of losses. UserError where settings contradict."""
        names, weights = self.names, self.weights()
        if self.sft_weight and "sft" in names:
            raise UserError("--sft_weight adds the sft loss that --loss_type names already; use one of the two")
        parameters = {name: getattr(self, name) for name in DEFAULTS}
        check_loss(names, weights=weights, **parameters)
        check_read(names, parameters)
        if self.sft_weight:
            names, weights = (*names, "sft"), (*weights, self.sft_weight)
        return LossOptions(names, weights, self.beta, parameters)

    def weights(self) -> tuple[float, ...]:
        """One weight per loss. UserError for what is no list of finite numbers."""
        if not self.loss_weights:
            return (1.0,) * len(self.names)
        try:
            weights = tuple(float(weight) for weight in self.loss_weights.split(","))
        except ValueError:
            raise UserError(f"--loss_weights {self.loss_weights}: give numbers, such as 1.0 0.05") from None
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"--loss_weights {self.loss_weights}: every weight must be a finite number")
        return weights
