"""f-divergences in the place of the reverse KL: a log-ratio r becomes f'(e^r), up to a constant (f-DPO, 2309.16240).

Names and values are TRL's (``f_divergence_type``, ``f_alpha_divergence_coef``). They are made for log-ratios of
likelihoods; here r is a difference of two bounds, estimated, and what is not linear in it has the estimate's noise as a
bias: more forwards (``--num_mc_samples``) make it smaller. ``reverse_kl`` is linear and has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST = 80.0
"""Of an exponent, beyond which fp32 overflows."""
READERS = (
    *("sigmoid", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "discopop"),
    "sft",
)
"""Losses of log-ratios alone, which another divergence may replace; ``sft`` beside them reads none."""


def remapped(ratio_B2: Tensor, divergence: str, coefficient: float) -> Tensor:
    """f'(e^r) without its constant: -e^-r (forward_kl), log σ(r) (js_divergence), e^((α-1) r) / (α-1)
    (alpha_divergence; α = 1 is reverse_kl: r itself)."""
    from torch.nn.functional import logsigmoid

    if divergence == "forward_kl":
        return -(-ratio_B2).clamp(max=LARGEST).exp()
    if divergence == "js_divergence":
        return logsigmoid(ratio_B2)
    if divergence == "alpha_divergence" and abs(coefficient - 1) >= 1e-6:
        return ((coefficient - 1) * ratio_B2).clamp(max=LARGEST).exp() / (coefficient - 1)
    return ratio_B2


def wpo_weight(policy_B2: Tensor, tokens_B2: Tensor) -> Tensor:
    """exp(S_w/L_w + S_l/L_l), detached: how likely the policy is to write both answers itself, as a mean over tokens
    (WPO, arXiv 2406.11827, eq. 2). S is a bound, so the weight is one too: at most the one of the likelihoods. TRL
    divides by the sum of squared probabilities at every token ("alignment"), which scores do not keep; that is left
    out, as in the equation."""
    return (policy_B2.detach() / tokens_B2.clamp(min=1)).sum(1).exp()
