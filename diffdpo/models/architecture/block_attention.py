"""Which keys a query of a block-causal family sees, and the attention that hides the others, in two ways.

A key is seen by the queries of some consecutive blocks. SDPA takes that as a dense mask and computes what is hidden
too; FlexAttention (GPU) is told which tiles of 128 by 128 nobody sees, and leaves them out.

Shapes: S queries, K keys, R rows, H heads, G key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu

LAST = 2**31 - 1
"""Above every block's number: keys that all later blocks see."""
Hiding = Tensor | BlockMask
KERNELS = 64
"""Most that are compiled: sizes of 1 and others, with gradient and without, are kernels of their own, more than torch's
limit of 8."""


@dataclass(frozen=True)
class Visibility:
    """Queries are of blocks `query_S`; key k is seen by queries of the blocks first_K[k] to last_K[k]."""

    query_S: Tensor
    first_K: Tensor
    last_K: Tensor

    def dense(self) -> Tensor:
        """bool [S, K], True where seen."""
        query_S1 = self.query_S[:, None]
        return (query_S1 >= self.first_K) & (query_S1 <= self.last_K)

    def rule(self) -> BlockMask:
        """For FlexAttention, the same for all rows and heads."""
        query_S, first_K, last_K = self.query_S, self.first_K, self.last_K

        def seen(_row: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (query_S[q] >= first_K[k]) & (query_S[q] <= last_K[k])

        # numbers of heads and rows are left open, so that one mask serves every call
        return create_block_mask(seen, None, None, len(query_S), len(first_K), device=query_S.device)


def hidden_attention(q: Tensor, k: Tensor, v: Tensor, hiding: Hiding) -> Tensor:
    """q [R, S, H, D], k and v [R, K, G, D], `hiding` of [S, K] → [R, S, H*D]."""
    if isinstance(hiding, BlockMask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with torch._dynamo.config.patch(recompile_limit=KERNELS):
            out = compiled_flex()(q, k, v, block_mask=hiding, enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2).flatten(2)
    return _masked(q, k, v, hiding)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask_SK: Tensor) -> Tensor:
    """Query heads of a group are a call's heads, and groups stand beside the rows: the GPU kernels that take a mask
    know no grouped queries, and would fall back to one that holds all scores."""
    (rows, _, heads, _), groups = q.shape, k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if heads != groups:
        q = q.unflatten(1, (groups, -1)).flatten(0, 1)
        k, v = (t.flatten(0, 1)[:, None].expand(-1, heads // groups, -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SK)
    out = out if heads == groups else out.unflatten(0, (rows, groups)).flatten(1, 2)
    return out.transpose(1, 2).flatten(2)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention's kernel. `dynamic`, or every length would compile anew; `fullgraph`, or the call after the last
    kernel would silently be the uncompiled one, which holds all scores."""
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True, fullgraph=True))


def check_flex(device: torch.device, *, block_size: int | None) -> None:
    """UserError where FlexAttention has nothing to do or cannot train."""
    asked = "--attn_implementation flex_attention"
    if not block_size:
        raise UserError(
            f"{asked} is for block-causal models; this one sees whole rows, which have no mask: leave it out (sdpa)"
        )
    if not is_gpu(device):
        raise UserError(f"{asked} has no backward on a CPU, and this is the {device.type} device: leave it out (sdpa)")
