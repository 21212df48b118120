"""How rows of tokens lie in one flat stream, and the bidirectional attention over them.

Linear layers and norms see a stream [N, hidden] with no notion of rows; only attention needs to know which tokens
belong together. A `Layout` says so: the stream is a sequence of *buckets*, each `rows x width` tokens of rows of
(nearly) equal length. Exact buckets compute no padding at all and are block-diagonal attention by construction; one
bucket of full width is the ordinary padded batch. Equal buckets need no mask, which is what makes them fast.

Shapes: R rows, T padded length, N tokens in the stream, H heads, G key/value heads, D head size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdpo.gpus import is_gpu, kind_of

try:  # block-diagonal flash attention; used on GPUs of compute capability >= 8.0 only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]
VARLEN_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether it takes fewer key heads than query heads; torch 2.11 does not."""


@dataclass(frozen=True)
class Bucket:
    """`rows` rows of `width` stream tokens starting at `start`; `lengths` are their real lengths (<= width)."""

    start: int
    rows: int
    width: int
    lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.width

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width


@dataclass(frozen=True)
class Layout:
    """Where the tokens of R rows lie in the stream.

    `index_N` are indices into the flattened [R, T] batch (padding inside a bucket included); `offset_R[r]` is the
    stream position of row r's first token; `positions_N` are the rotary positions, restarting in every row.
    """

    buckets: tuple[Bucket, ...]
    index_N: Tensor
    positions_N: Tensor
    offset_R: Tensor
    mask_per_bucket: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return self.index_N.shape[0]

    @cached_property
    def max_length(self) -> int:
        return max(bucket.width for bucket in self.buckets)

    @property
    def exact(self) -> bool:
        return not any(bucket.padded for bucket in self.buckets)

    @cached_property
    def cumulative_lengths(self) -> Tensor:
        """int32 [R+1] boundaries of the rows, for varlen kernels (exact buckets only)."""
        widths = [bucket.width for bucket in self.buckets for _ in range(bucket.rows)]
        return F.pad(torch.tensor(widths).cumsum(0), (1, 0)).to(self.index_N.device, torch.int32)

    def at(self, layer: int) -> "Layout":
        """This layout: it is the same in every layer."""
        return self

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        """Attention inside each row, full unless made for blocks; grouped-query when G < H. Returns [N, H*D]."""
        if len(self.buckets) > 1 and self.exact and _varlen_usable(q_NHD):
            return self._attend_varlen(q_NHD, k_NGD, v_NGD)
        grouped = k_NGD.shape[1] != q_NHD.shape[1]
        sizes = [bucket.rows * bucket.width for bucket in self.buckets]
        parts = zip(*(t.split(sizes) for t in (q_NHD, k_NGD, v_NGD)), strict=True)
        outputs = []
        for bucket, mask, qkv in zip(self.buckets, self.mask_per_bucket, parts, strict=True):
            q, k, v = (t.unflatten(0, (bucket.rows, bucket.width)).transpose(1, 2) for t in qkv)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_varlen(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        cuts, longest = self.cumulative_lengths, self.max_length
        grouped: Any = {"enable_gqa": True} if k_NGD.shape[1] != q_NHD.shape[1] else {}
        if grouped and not VARLEN_GROUPS:
            repeat, grouped = q_NHD.shape[1] // k_NGD.shape[1], {}
            k_NGD, v_NGD = (t.repeat_interleave(repeat, dim=1) for t in (k_NGD, v_NGD))
        out = varlen_attn(q_NHD, k_NGD, v_NGD, cuts, cuts, longest, longest, **grouped)
        return cast(Tensor, out).flatten(1)

    @classmethod
    def packed(cls, lengths: Sequence[int], padded_length: int, *, device="cpu", max_waste: float = 0.0) -> "Layout":
        """Rows of a right padded [R, T] batch, sorted by length into buckets that waste at most `max_waste` tokens.

        `max_waste` is the share of padding allowed inside a bucket: 0 gives exact buckets, 1 one padded batch.
        """
        lengths = [max(1, length) for length in lengths]  # an empty row would attend to nothing and give NaN
        order = sorted(range(len(lengths)), key=lambda r: (lengths[r], r))
        buckets, members, start = [], [], 0
        while order:
            size = _bucket_size([lengths[r] for r in order], max_waste)
            rows, order = order[-size:], order[:-size]
            buckets.append(Bucket(start, size, lengths[rows[-1]], tuple(lengths[r] for r in rows)))
            members.append(rows)
            start = buckets[-1].stop
        return cls._build(tuple(buckets), members, padded_length, device)

    @classmethod
    def padded(
        cls, lengths: Sequence[int], padded_length: int, *, device="cpu", block_size: int | None = None
    ) -> "Layout":
        """The whole [R, T] batch as one bucket, padding computed and hidden by a mask (the shape HF users expect).

        `block_size`: tokens see their own block and those before it.
        """
        bucket = Bucket(0, len(lengths), padded_length, tuple(max(1, length) for length in lengths))
        layout = cls._build((bucket,), [list(range(len(lengths)))], padded_length, device)
        if not block_size:
            return layout
        block_T = torch.arange(padded_length, device=device) // block_size
        mask, seen_TT = layout.mask_per_bucket[0], block_T[:, None] >= block_T[None, :]
        return replace(layout, mask_per_bucket=(seen_TT if mask is None else mask & seen_TT,))

    @classmethod
    def _build(cls, buckets, members, padded_length: int, device) -> "Layout":
        index, positions, offset, masks = [], [], torch.zeros(sum(b.rows for b in buckets), dtype=torch.long), []
        for bucket, rows in zip(buckets, members, strict=True):
            columns = torch.arange(bucket.width)
            row = torch.tensor(rows)
            index.append((row[:, None] * padded_length + columns).flatten())
            positions.append(columns.repeat(bucket.rows))
            offset[row] = bucket.start + bucket.width * torch.arange(bucket.rows)
            visible = columns < torch.tensor(bucket.lengths)[:, None]
            masks.append(visible[:, None, None, :].to(device) if bucket.padded else None)
        index_N, positions_N, offset_R = (t.to(device) for t in (torch.cat(index), torch.cat(positions), offset))
        return cls(buckets, index_N, positions_N, offset_R, tuple(masks))


def _bucket_size(ascending: Sequence[int], max_waste: float) -> int:
    """How many of the longest rows form the next bucket. The longest row sets the width."""
    width, tokens = ascending[-1], 0
    for size, length in enumerate(reversed(ascending), start=1):
        tokens += length
        if size * width - tokens > max_waste * size * width:
            return size - 1
    return len(ascending)


def _varlen_usable(q: Tensor) -> bool:
    """The varlen kernel is flash attention: half precision, heads it can tile, on an Ampere or newer GPU."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return varlen_attn is not None and fits and is_gpu(q.device) and kind_of(q.device).tiles_flash(q.device)
