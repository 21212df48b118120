"""How masks and weights are drawn for a score."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """The estimator of the diffusion score and how many forwards it takes."""

    title: ClassVar[str] = "scores"

    score_estimator: str = setting(
        "auto",
        "how masks and weights are drawn (docs/theory.md); auto: exact where blocks have up to 4 tokens, else balanced",
        common=True,
    )
    num_mc_samples: int = setting(4, "forwards a score (n)", at_least=1, common=True)
    num_diffusion_steps: int | None = setting(None, "T of the `trajectory` estimator", at_least=1)
    fill_last_block: bool = setting(
        False, "block-causal models: fill an answer's last block with scored terminators, as some training code does"
    )
    seed: int = setting(0, "same seed, same data order, same noise, same numbers", at_least=0, common=True)
