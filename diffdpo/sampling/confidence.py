"""Which token a masked position would become, and how sure the model is of it: the order of unmasking.

Shapes: M masked positions, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gumbel_argmax(logits_MV: Tensor, temperature: float, noise: Callable[[], Tensor]) -> Tensor:
    """A sample of softmax(logits / temperature) per row, [M]; the argmax at temperature 0.

    In fp64: in lower precision the tails of the noise are quantised, which lowers the effective temperature (Zheng et
    al., 2409.02908). `noise()` gives uniforms [M, V]; it is not called at temperature 0.
    """
    if temperature == 0:
        return logits_MV.argmax(-1)
    gumbel = -torch.log(-torch.log(noise().clamp_(1e-300, 1 - 1e-16)))
    return (logits_MV.double() / temperature + gumbel).argmax(-1)


def uniform_noise(row_M: Tensor, generators: Sequence[torch.Generator], like_MV: Tensor) -> Tensor:
    """fp64 uniforms of the shape of `like_MV`; line i comes from `generators[row_M[i]]`.

    One generator per prompt makes its noise independent of its neighbours. Drawn on the CPU: equal on every device.
    `row_M` is ascending.
    """
    rows, counts = row_M.unique_consecutive(return_counts=True)
    parts = [
        torch.rand(count, like_MV.shape[1], generator=generators[row], dtype=torch.float64)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    ]
    return torch.cat(parts).to(like_MV.device)


def chosen_probability(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """p(token): LLaDA's low-confidence remasking (2502.09992, algorithm 5), Dream's maskgit_plus."""
    return p_MV.gather(-1, token_M[:, None]).squeeze(-1)


def top_margin(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """Difference of the two largest probabilities (Dream's topk_margin; Kim et al., 2502.06768)."""
    first, second = p_MV.topk(2, dim=-1).values.unbind(-1)
    return first - second


def negative_entropy(p_MV: Tensor, token_M: Tensor) -> Tensor:
    """Sum p log p (Dream's entropy order)."""
    return torch.xlogy(p_MV, p_MV).sum(-1)


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "low_confidence": chosen_probability,
    "top_margin": top_margin,
    "entropy": negative_entropy,
}
"""Name -> confidence [M]; the most confident positions are unmasked first. "random" needs noise and lives in decode."""
