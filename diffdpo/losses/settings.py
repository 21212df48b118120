"""The objective: which losses, with which weights and parameters."""

import math
from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.losses.divergence import DIVERGENCES, READERS
from diffdpo.losses.options import LossOptions
from diffdpo.losses.preference import DEFAULTS, LOSSES, LossParameters, check_loss, check_read
from diffdpo.settings.base import setting

BY_TOKEN = ("simpo", "sft")  # read means over an answer's tokens as they are; ipo and sigmoid_norm as TRL has them


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
    f_divergence_type: str = setting(
        "reverse_kl", "what holds the policy to the reference (f-DPO); see docs/losses.md", choices=DIVERGENCES
    )
    f_alpha_divergence_coef: float = setting(1.0, "α of --f_divergence_type alpha_divergence")
    use_weighting: bool = setting(False, "WPO: a pair counts as the policy would write both answers itself")
    ld_alpha: float | None = setting(
        None, "LD-DPO: weight of the tokens that the longer answer has more, 0 to 1; default: 1", at_least=0
    )
    sft_weight: float = setting(0.0, "adds -sft_weight * score(chosen) / tokens(chosen)", at_least=0)

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that ``loss_type`` names."""
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
        """The settings as one sum of losses. UserError where settings contradict."""
        names, weights = self.names, self.weights()
        if self.sft_weight and "sft" in names:
            raise UserError("--sft_weight adds the sft loss that --loss_type names already; use one of the two")
        parameters = {name: getattr(self, name) for name in DEFAULTS}
        check_loss(names, weights=weights, **parameters)
        check_read(names, parameters)
        if self.sft_weight:
            names, weights = (*names, "sft"), (*weights, self.sft_weight)
        self._check_variants(names)
        return LossOptions(
            names,
            weights,
            self.beta,
            parameters,
            divergence=self.f_divergence_type,
            divergence_coefficient=self.f_alpha_divergence_coef,
            use_weighting=self.use_weighting,
        )

    def _check_variants(self, names: tuple[str, ...]) -> None:
        """UserError where the losses have nothing that a variant could change."""
        others = [name for name in names if name not in READERS]
        if self.f_divergence_type != "reverse_kl" and others:
            raise UserError(
                f"--f_divergence_type {self.f_divergence_type} is not defined for {others[0]}; it is for "
                f"{', '.join(READERS[:-1])}"
            )
        if self.f_alpha_divergence_coef != 1 and self.f_divergence_type != "alpha_divergence":
            raise UserError("--f_alpha_divergence_coef is read by --f_divergence_type alpha_divergence alone")
        if self.f_alpha_divergence_coef == 1 and self.f_divergence_type == "alpha_divergence":
            raise UserError(
                "--f_divergence_type alpha_divergence with α = 1 is reverse_kl; give another "
                "--f_alpha_divergence_coef, such as 0.5"
            )
        self._check_shorter_tails(names)
        apart = [name for name in names if LOSSES[name].scope != "pair"]
        for flag, given in (("use_weighting", self.use_weighting), ("ld_alpha", self.ld_alpha is not None)):
            if given and apart:
                raise UserError(f"--{flag} is of pairs one by one, and {apart[0]} is no such loss; leave one out")

    def _check_shorter_tails(self, names: tuple[str, ...]) -> None:
        """UserError where ``--ld_alpha`` would take weight off what is divided by the whole length, or is learned as it
        is written."""
        if self.ld_alpha is None:
            return
        if self.ld_alpha > 1:
            raise UserError(f"--ld_alpha is {self.ld_alpha:g}; it is a weight from 0 to 1")
        others = ["--use_weighting"] * self.use_weighting + ["--sft_weight"] * bool(self.sft_weight)
        if others := others + [name for name in names if name in BY_TOKEN]:
            raise UserError(
                f"--ld_alpha takes weight off the longer answer's score, and {others[0]} reads the mean of its tokens; "
                "leave one out"
            )

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
