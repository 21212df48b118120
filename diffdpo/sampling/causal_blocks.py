"""Sampling from a block-causal family: its own blocks from left to right, finished ones kept as keys and values.

Clean tokens depend on nothing behind them, so keeping them changes no number: the tokens are those of recomputing all.
The prompt's whole blocks are run once; each step runs the current block alone against what is kept, the prompt's part
of the block the prompt ends in standing in it; a finished block is run once more, clean, and kept. A row whose answer
has ended leaves the batch with its block. With shifted logits a block's first token is predicted by the last one before
it.

Shapes: R rows of the canvas, S rows that are run, B tokens of a block, T longest row, C kept tokens, H heads, G
key/value heads, D head size, K hidden size, M masked positions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdpo.models.architecture.backbone import MaskedLM
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.sampling.block_cache import RecordingLayout
from diffdpo.sampling.canvas import Canvas


class KeptBlocks:
    """Keys and values [R, T, G, D] of each layer, of which row r has the first `length_R[r]`; and the hidden states
    [R, K] of each row's last kept token, where logits are shifted."""

    def __init__(self, model: MaskedLM, spec: FamilySpec, canvas: Canvas, start_R: Tensor):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length_R, self.hidden_RK = start_R.clone(), None
        device, longest = model.embed.weight.device, int(start_R.max())
        self.room = canvas.ids_RT.shape[1]
        if longest:
            layout = Layout.padded(start_R.tolist(), longest, device=device, block_size=spec.block_size)
            recorded, rows = RecordingLayout(layout), torch.arange(len(canvas))
            last_R = (rows * longest + (start_R - 1).clamp(min=0)).to(device)
            self.hidden_RK = model.hidden_states(
                canvas.ids_RT[:, :longest].to(device).flatten(), recorded, keep_M=last_R
            )
            shape = (len(canvas), longest)
            self.layers = [tuple(self._with_room(t.unflatten(0, shape)) for t in kv) for kv in recorded.layers]  # type: ignore[misc]

    def _with_room(self, kept: Tensor) -> Tensor:
        return F.pad(kept, (0, 0, 0, 0, 0, self.room - kept.shape[1]))

    def append(self, rows: Tensor, block: "BlockOverKept", hidden_SK: Tensor) -> None:
        """The clean block of each of `rows`, just run, behind what is kept of them."""
        if not self.layers:
            empty = [tuple(t.new_zeros(len(self.length_R), self.room, *t.shape[2:]) for t in kv) for kv in block.own]
            self.layers = empty  # type: ignore[assignment]
        place_SB = self.length_R[rows, None] + torch.arange(block.width)
        for kept, own in zip(self.layers, block.own, strict=True):
            for whole, part in zip(kept, own, strict=True):
                whole[rows[:, None].to(whole.device), place_SB.to(whole.device)] = part
        self.length_R[rows] += block.width
        if self.hidden_RK is None:
            self.hidden_RK = hidden_SK.new_zeros(len(self.length_R), hidden_SK.shape[1])
        self.hidden_RK[rows.to(hidden_SK.device)] = hidden_SK


class BlockOverKept:
    """The layout of one block a row: its tokens see each other and all that is kept of their row."""

    def __init__(self, kept: KeptBlocks, rows: Tensor, width: int, device: torch.device):
        self.kept, self.rows, self.width, self.layer = kept, rows.to(device), width, 0
        length_S = kept.length_R[rows]
        self.positions_N = (length_S[:, None] + torch.arange(width)).flatten().to(device)
        self.max_length = int(self.positions_N.max()) + 1
        self.seen = int(length_S.max())
        visible_SC = torch.arange(self.seen) < length_S[:, None]
        mask = torch.cat([visible_SC, torch.ones(len(rows), width, dtype=torch.bool)], 1)
        self.mask = mask[:, None, None, :].to(device)
        self.own: list[tuple[Tensor, Tensor]] = []

    def at(self, layer: int) -> "BlockOverKept":
        """This layout, about to attend in the layer."""
        self.layer = layer
        return self

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        """[S * B, H * D]."""
        q, k, v = (t.unflatten(0, (len(self.rows), self.width)) for t in (q_NHD, k_NGD, v_NGD))
        self.own.append((k, v))
        if self.seen:
            before_k, before_v = (t[self.rows, : self.seen] for t in self.kept.layers[self.layer])
            k, v = torch.cat([before_k, k], 1), torch.cat([before_v, v], 1)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


class CausalBlockPredictor:
    """What a step asks of a model: `hidden_states(row_M, column_M)` [1, M, K] in the current block, and `logits`."""

    def __init__(self, model: MaskedLM, spec: FamilySpec, canvas: Canvas, kept: KeptBlocks, window_RB: Tensor):
        self.model, self.canvas, self.kept, self.window_RB = model, canvas, kept, window_RB
        self.shift, self.device = spec.logit_shift, model.embed.weight.device

    def hidden_states(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        """One forward of the blocks of these rows."""
        rows = row_M.unique()
        local_M, output_M = torch.searchsorted(rows, row_M), column_M - self.shift
        inside_M = output_M >= 0
        keep_M = (local_M * self.window_RB.shape[1] + output_M)[inside_M].to(self.device)
        hidden_MK, _ = self._run(rows, keep_M)
        if bool(inside_M.all()):
            return hidden_MK[None]
        assert self.kept.hidden_RK is not None, "a first token has one before it"
        whole_MK = self.kept.hidden_RK[row_M.to(self.device)]
        whole_MK[inside_M.to(self.device)] = hidden_MK
        return whole_MK[None]

    def logits(self, hidden_GMK: Tensor) -> Tensor:
        """Logits [M, V]."""
        return self.model.head(hidden_GMK[0])

    def finish(self, rows: Tensor) -> None:
        """Keep the block of these rows as it now stands."""
        last_S = ((torch.arange(len(rows)) + 1) * self.window_RB.shape[1] - 1).to(self.device)
        hidden_SK, block = self._run(rows, last_S)
        self.kept.append(rows, block, hidden_SK)

    def _run(self, rows: Tensor, keep_M: Tensor) -> tuple[Tensor, BlockOverKept]:
        block = BlockOverKept(self.kept, rows, self.window_RB.shape[1], self.device)
        ids_N = self.canvas.ids_RT.gather(1, self.window_RB)[rows].flatten().to(self.device)
        return self.model.hidden_states(ids_N, block, keep_M=keep_M), block


def causal_blocks(
    model: MaskedLM, spec: FamilySpec, canvas: Canvas
) -> Iterator[tuple[CausalBlockPredictor, Tensor, list[int]]]:
    """(predictor, window [R, B], rows still to be filled) of each block in turn; kept when the next one is asked for.

    The canvas ends with a block in every row. A row beyond its end keeps its last window and is not among the rows.
    """
    size = spec.block_size
    assert size, "of a block-causal family"
    start_R = canvas.prompt_length_R // size * size
    stop_R = torch.tensor(canvas.lengths)
    kept = KeptBlocks(model, spec, canvas, start_R)
    for number in range(int(((stop_R - start_R) // size).max())):
        first_R = torch.minimum(start_R + number * size, stop_R - size)
        window_RB = first_R[:, None] + torch.arange(size)
        there_R = start_R + number * size < stop_R
        rows = [row for row in range(len(canvas)) if there_R[row] and not canvas.ended(row)]
        if not rows:
            return
        predictor = CausalBlockPredictor(model, spec, canvas, kept, window_RB)
        yield predictor, window_RB, rows
        onward = [row for row in rows if first_R[row] + size < stop_R[row] and not canvas.ended(row)]
        if onward:
            predictor.finish(torch.tensor(onward))
