"""Keys and values outside the current block, kept from the block's first step (Fast-dLLM's dual cache, 2505.22618).

Bidirectional attention has no exact cache: every revealed token changes every hidden state. Within one block the
change is small, so the first step of a block computes all tokens and the later ones only the block's, against stale
keys and values of the rest. An approximation; `docs/models.md` states how often it changes a token.

Shapes: R rows, W tokens of the window in a row, N tokens of all rows, H heads, G key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdpo.models.architecture.layout import Layout


class RecordingLayout:
    """A layout that keeps the keys and values of every layer that attends through it."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.positions_N, self.max_length = layout.positions_N, layout.max_length
        self.layers: list[tuple[Tensor, Tensor]] = []

    def at(self, layer: int) -> "RecordingLayout":
        """This layout: its layers follow from the order of calls."""
        return self

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        self.layers.append((k_NGD.clone(), v_NGD.clone()))
        return self.layout.attend(q_NHD, k_NGD, v_NGD)


class WindowLayout:
    """The window's tokens alone are computed; they attend to the recorded keys and values of their row.

    `window_RW`: positions inside each row (in the order of the [R, T] batch) that are computed.
    """

    def __init__(self, recorded: RecordingLayout, window_RW: Tensor):
        layout = recorded.layout
        self.layout, self.layers, self.width = layout, recorded.layers, window_RW.shape[1]
        order_R = layout.offset_R.argsort()  # the window's stream follows the order of the buckets
        self.order_R = order_R
        self.positions_N = window_RW[order_R].flatten()
        self.index_N = (layout.offset_R[order_R, None] + window_RW[order_R]).flatten()
        self.offset_R = torch.empty_like(order_R)
        self.offset_R[order_R] = torch.arange(len(order_R), device=order_R.device) * self.width
        self.max_length = layout.max_length
        self._layer = 0

    def at(self, layer: int) -> "WindowLayout":
        """This layout: its layers follow from the order of calls."""
        return self

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = self.layers[self._layer]
        self._layer = (self._layer + 1) % len(self.layers)
        keys[self.index_N], values[self.index_N] = k_NGD, v_NGD
        grouped, outputs, row = q_NHD.shape[1] != k_NGD.shape[1], [], 0
        for bucket, mask in zip(self.layout.buckets, self.layout.mask_per_bucket, strict=True):
            shape = (bucket.rows, bucket.width)
            k, v = (t[bucket.start : bucket.stop].unflatten(0, shape).transpose(1, 2) for t in (keys, values))
            q = q_NHD[row * self.width : (row + bucket.rows) * self.width].unflatten(0, (bucket.rows, self.width))
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
            row += bucket.rows
        return torch.cat(outputs)
