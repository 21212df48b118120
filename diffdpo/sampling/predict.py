"""Logits at masked positions of one block, with classifier-free guidance and optionally the block cache.

Shapes: R rows, B block length, W window (block plus the shift), M masked positions, K hidden size, V vocabulary; G is 2
with guidance (conditional, unconditional), else 1.
"""

import torch
from torch import Tensor

from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.backbone import MaskedLM, RowLayout
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.sampling.block_cache import RecordingLayout, WindowLayout
from diffdpo.sampling.canvas import Canvas

MAX_WASTE = 0.1


class BlockPredictor:
    """`hidden_states(row_M, column_M)` [G, M, K] for window positions of canvas rows, and `logits` of any of them.

    Guidance (2502.09992, eq. 16): logits = unconditional + (1 + scale) (conditional - unconditional), the
    unconditional input being the row with its prompt masked.
    """

    def __init__(
        self, model: MaskedLM, spec: FamilySpec, canvas: Canvas, window_RB: Tensor, *, cfg_scale: float, cached: bool
    ):
        self.model, self.canvas, self.window_RB = model, canvas, window_RB
        self.shift, self.cfg_scale, self.cached = spec.logit_shift, cfg_scale, cached
        self.device = model.computes_on or model.embed.weight.device
        self.recorded: RecordingLayout | None = None
        self.recorded_rows: Tensor = torch.empty(0, dtype=torch.long)

    def hidden_states(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        """One forward: [G, M, K], what the head makes logits of."""
        rows = self.recorded_rows if self.recorded else row_M.unique()
        local_M = torch.searchsorted(rows, row_M)
        ids, groups = self.canvas.ids_RT[rows], 1
        if self.cfg_scale:
            ids, groups = torch.cat((ids, self.canvas.without_prompts()[rows])), 2
            local_M, column_M = torch.cat((local_M, local_M + len(rows))), column_M.repeat(2)
            rows = rows.repeat(2)
        hidden = self._forward(ids, rows, local_M.to(self.device), column_M.to(self.device))
        return hidden.unflatten(0, (groups, -1))

    def logits(self, hidden_GMK: Tensor) -> Tensor:
        """Logits [M, V], guided where there is guidance."""
        logits_GMV = self.model.head(hidden_GMK.flatten(0, 1)).unflatten(0, hidden_GMK.shape[:2])
        if not self.cfg_scale:
            return logits_GMV[0]
        conditional, unconditional = logits_GMV
        return unconditional + (1 + self.cfg_scale) * (conditional - unconditional)

    def _forward(self, ids_RT: Tensor, rows: Tensor, local_M: Tensor, column_M: Tensor) -> Tensor:
        layout: RowLayout
        ids_RT, window_RB = ids_RT.to(self.device), self.window_RB[rows].to(self.device)
        if self.recorded:
            first_R = window_RB[:, :1] - self.shift
            window_RW = first_R + torch.arange(window_RB.shape[1] + self.shift, device=self.device)
            layout = window = WindowLayout(self.recorded, window_RW)
            ids_N = ids_RT.gather(1, window_RW)[window.order_R].flatten()
            keep_M = window.offset_R[local_M] + column_M  # output of position - shift: the window starts shift early
        else:
            lengths = [self.canvas.lengths[row] for row in rows.tolist()]
            layout = packed = Layout.packed(
                lengths, ids_RT.shape[1], device=self.device, max_waste=0.0 if is_gpu(self.device) else MAX_WASTE
            )
            ids_N = ids_RT.flatten()[packed.index_N]
            keep_M = packed.offset_R[local_M] + window_RB[local_M, column_M] - self.shift
            if self.cached:
                layout = self.recorded = RecordingLayout(packed)
                self.recorded_rows = rows[: len(rows) // 2] if self.cfg_scale else rows
        return self.model.hidden_states(ids_N, layout, keep_M=keep_M)
