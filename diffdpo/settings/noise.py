"""How masks and weights are drawn for a score."""

from dataclasses import dataclass
from typing import Any, ClassVar

from diffdpo.settings.base import Settings, setting

ESTIMATORS = (
    *("trajectory", "uniform_t", "stratified_t", "mask_count", "mask_count_mirror", "balanced", "paired"),
    *("quadrature", "exact"),
)
"""The names of ``noise.estimators.ESTIMATORS``, which imports numpy; a test holds the two together."""
WITHOUT_GRADIENT = ("auto", *ESTIMATORS, "sampler_order")
"""Those of scores that nothing is trained with."""


def scoring_estimator() -> Any:
    """The setting ``score_estimator`` of commands that only score."""
    help = "see docs/theory.md; auto: balanced, or exact for small blocks; sampler_order: the sampler's own likelihood"
    return setting("auto", help, known=WITHOUT_GRADIENT, common=True)


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(Settings):
    """The estimator of the diffusion score and how many forwards it takes."""

    title: ClassVar[str] = "scores"

    score_estimator: str = setting(
        "auto",
        "see docs/theory.md; auto: balanced, or exact for small blocks",
        known=("auto", *ESTIMATORS),
        common=True,
    )
    num_mc_samples: int = setting(4, "forwards a score (n)", at_least=1, common=True)
    num_diffusion_steps: int | None = setting(
        None, "T of the `trajectory` estimator; default: --num_mc_samples", at_least=1
    )
    fill_last_block: bool = setting(
        False, "block-causal models: fill an answer's last block with scored terminators, as some training code does"
    )
    seed: int = setting(0, "same seed, same data order, same noise, same numbers", at_least=0, common=True)
