"""What rounding alone makes of two equal scores.

The same rows under the same weights do not give the same bits in every forward: one with a graph takes other kernels
than one without, other segments have other shapes, and processors and numbers of threads add in other orders. So a
difference of scores is compared with the size of what it is the difference of, never with a fixed number of nats: one
unit in the last place of a score of 300 nats is 3e-5.

Shape suffixes: B pairs, 2 sides (0 chosen, 1 rejected).
"""

import torch
from torch import Tensor

RELATIVE = {False: 2.0**-20, True: 2.0**-13}
"""Of :func:`size_of`, with weights in fp32 and in bf16: about ten times what was measured over segments of all sizes,
with and without a graph, and three sets of instructions (docs/LOG.md, 2026-11-28)."""


def size_of(score_B2: Tensor, tokens_B2: Tensor) -> Tensor:
    """size_B, in nats: how much was added up to compare a pair. The tokens count too: log p of a token that is nearly
    certain is about 0, but the logits it is a difference of are not."""
    return (score_B2.abs() + tokens_B2).sum(1)


def preferred(margin_B: Tensor, size_B: Tensor) -> Tensor:
    """1 where a margin of scores (nats, of fp32 weights) is above 0, 0 where it is below, and 1/2 for a tie: where it
    is no larger than rounding could have made it. NaN where the margin is not finite: neither is preferred."""
    tied_B = margin_B.abs() <= RELATIVE[False] * size_B
    known_B = torch.where(tied_B, 0.5, (margin_B > 0).to(margin_B.dtype))
    return torch.where(margin_B.isfinite(), known_B, torch.nan)
