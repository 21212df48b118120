"""Which token a masked position would become, and how sure the model is of it: the order of unmasking.

Shapes: M masked positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gumbel_argmax(logits_MV: Tensor, temperature: float, noise: Callable[[], Tensor]) -> Tensor:
    """A sample of softmax(logits / temperature) per row, [M]; the argmax at temperature 0.

    In fp64: in lower precision the tails of the noise are quantised, which lowers the effective temperature (Zheng et
    al., 2409.02908). `noise()` gives uniforms [M, V]; it is not called at temperature 0.
    """
    if temperature == 0:
        return logits_MV.argmax(-1)
    gumbel = noise().clamp_(1e-300, 1 - 1e-16).log_().neg_().log_().neg_()
    return gumbel.add_(logits_MV.double() / temperature).argmax(-1)


def chosen_probability(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """p(token): LLaDA's low-confidence remasking (2502.09992, algorithm 5), and Dream's maskgit_plus."""
    return p_MV.gather(-1, token_M[:, None]).squeeze(-1)


def top_margin(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """Difference of the two largest probabilities (Dream's topk_margin; Kim et al., 2502.06768)."""
    first, second = p_MV.topk(2, dim=-1).values.unbind(-1)
    return first - second


def negative_entropy(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """Sum p log p (Dream's entropy order)."""
    return torch.xlogy(p_MV, p_MV).sum(-1)


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maskgit_plus": chosen_probability,
    "low_confidence": chosen_probability,
    "top_margin": top_margin,
    "entropy": negative_entropy,
}
"""Name -> confidence [M]; the most confident positions are unmasked first. "random" is noise alone."""
TEMPERED = frozenset({"maskgit_plus", "top_margin", "entropy"})
"""Dream's orders look at softmax(logits / temperature), as its `sample_tokens` does; LLaDA's at softmax(logits)."""


def choose(logits_MV: Tensor, noise: Callable[[], Tensor], *, temperature: float, order: str) -> tuple[Tensor, Tensor]:
    """Tokens [M] and how sure the model is of them, fp64 [M]; all zero in the order "random". See `gumbel_argmax`."""
    token_M = gumbel_argmax(logits_MV, temperature, noise)
    if order == "random":
        return token_M, torch.zeros_like(token_M, dtype=torch.float64)
    wide_MV = logits_MV.double()
    if temperature and order in TEMPERED:
        wide_MV = wide_MV / temperature
    return token_M, ORDERS[order](wide_MV.softmax(-1), token_M)
