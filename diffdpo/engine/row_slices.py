"""Rows longer than one process holds: each row's tokens lie on S processes, and attention exchanges heads for tokens.

DeepSpeed-Ulysses (Jacobs et al., 2023) for bidirectional rows. The S processes of a group run each other's rows
together, every one its 1/S of the stream. All but attention is about one token. For attention a process gives away all
heads but 1/S of them and gets the other tokens of those: two exchanges a layer, whose bytes do not grow with S.

Who reads which records, and whose gradients are added, is as without: a process scores the rows of its own records, and
the parts of a row's gradient add up over the processes as those of records do. So that a forward holds a row of one
process at a time, segments take turns (``scores.segments``): a process with nothing to score lends its hands.

Shapes: R rows, T padded length, N tokens of the stream, C = N/S of them, M scored positions, H heads, G key heads, D.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import RowLayout, native
from diffdpo.models.architecture.layout import Layout


class RowSlices:
    """The processes that share rows with this one. A scoring module that is given it as ``slices`` asks it to run."""

    def __init__(self, group: Any, index: int, size: int):
        self.group, self.index, self.size = group, index, size

    def __deepcopy__(self, memo: Any) -> "RowSlices":
        return self  # a copy of a module talks to the same processes

    def log_probs(self, module: Any, inputs: Sequence[Tensor], max_waste: float) -> Tensor:
        """log p of this process's targets, [M]; every process of the group calls. ``inputs``: those of the module."""
        joint, own = self._together(inputs)
        ids_RT, lengths_R, row_M, position_M, target_M = joint
        lengths = lengths_R.tolist()
        whole = Layout.packed(lengths, ids_RT.shape[1], device=ids_RT.device, max_waste=max_waste)
        if self.index == 0:
            module.counted.computed += len(whole)
            module.counted.padding += len(whole) - sum(lengths)
        layout = SlicedLayout(whole, self)
        keep_M = whole.offset_R[row_M] + position_M - module.spec.logit_shift
        here_M = torch.nonzero((keep_M >= layout.start) & (keep_M < layout.start + layout.share)).flatten()
        ids_C = layout.part(ids_RT.flatten()[whole.index_N])
        hidden_MK = module.hidden_states(ids_C, layout, keep_M[here_M] - layout.start)
        logp = module.log_probs(hidden_MK, target_M[here_M])
        every_M = torch.zeros(len(keep_M), dtype=logp.dtype, device=logp.device).index_put((here_M,), logp)
        return _Summed.apply(every_M, self.group)[own]

    def _together(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], slice]:
        """The inputs of all processes of the group as one batch, and which of its positions are this process's."""
        ids_RT, _, row_M, *_ = inputs
        sizes = self._gather(torch.tensor([*ids_RT.shape, len(row_M)], device=ids_RT.device)).view(self.size, 3)
        counts = [rows * length + rows + 3 * scored for rows, length, scored in sizes.tolist()]
        flat = torch.cat([each.reshape(-1) for each in inputs])
        everyone = self._gather(F.pad(flat, (0, max(counts) - len(flat)))).view(self.size, -1)
        width, first_row, parts = int(sizes[:, 1].max()), 0, []
        for (rows, length, scored), count, numbers in zip(sizes.tolist(), counts, everyone, strict=True):
            cuts = [rows * length, rows, scored, scored, scored]
            ids, lengths, row, position, target = numbers[:count].split(cuts)
            parts.append(
                (F.pad(ids.view(rows, length), (0, width - length)), lengths, row + first_row, position, target)
            )
            first_row += rows
        before = int(sizes[: self.index, 2].sum())
        return [torch.cat(each) for each in zip(*parts, strict=True)], slice(before, before + len(row_M))

    def _gather(self, tensor: Tensor) -> Tensor:
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.cat(pieces)

    def to_tokens(self, x_CHD: Tensor) -> Tensor:
        """All heads of this process's tokens [C, H, D] → all tokens of its heads [S C, H/S, D]."""
        by_process = x_CHD.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        return _Exchanged.apply(by_process, self.group).flatten(0, 1)

    def to_heads(self, x_NK: Tensor) -> Tensor:
        """And back, heads and their numbers in one: [S C, K/S] → [C, K]."""
        by_process = x_NK.unflatten(0, (self.size, -1)).contiguous()
        return _Exchanged.apply(by_process, self.group).transpose(0, 1).flatten(1)


class SlicedLayout:
    """A process's ``share`` of a stream, from ``start`` on: what `RowLayout` asks, attention over all of it."""

    def __init__(self, whole: RowLayout, slices: RowSlices):
        self.whole, self.slices = whole, slices
        self.tokens = len(whole.positions_N)
        self.share = -(-self.tokens // slices.size)
        self.start = slices.index * self.share
        self.positions_N, self.max_length = self.part(whole.positions_N), whole.max_length

    def part(self, value_N: Tensor) -> Tensor:
        """This process's of what there is for each token; 0 beyond the end."""
        filled = F.pad(value_N, (0, self.share * self.slices.size - self.tokens))
        return filled[self.start : self.start + self.share]

    def at(self, layer: int) -> "SlicedLayout":
        return self

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        size = self.slices.size
        repeat = size // math.gcd(k_NGD.shape[1], size)
        if repeat > 1:  # until each process gets as many key heads
            k_NGD, v_NGD = (t.repeat_interleave(repeat, dim=1) for t in (k_NGD, v_NGD))
        mine = (self.slices.to_tokens(t)[: self.tokens] for t in (q_NHD, k_NGD, v_NGD))
        mixed = self.whole.attend(*mine)
        return self.slices.to_heads(F.pad(mixed, (0, 0, 0, self.share * size - self.tokens)))


class _Exchanged(torch.autograd.Function):
    """[S, ...] → [S, ...]: the i-th part goes to process i, whose part for this one comes in its place."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _Exchanged.apply(grad.contiguous(), ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over the group, on each of it, which all go on from: so gradients are summed on the way back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def row_slices(choice: EngineChoice, world: World) -> RowSlices | None:
    """The processes that share rows with this one; None where rows are whole. Every rank calls."""
    if choice.row_processes == 1:
        return None
    group = _group(dist.group.WORLD, choice.row_processes)
    return RowSlices(group, world.rank % choice.row_processes, choice.row_processes)


@lru_cache(maxsize=1)
def _group(world_group: Any, size: int) -> Any:
    """Made once a process group: neighbours, so that a group lies in one host where it can."""
    return dist.new_subgroups(group_size=size)[0]


def slice_rows(module: nn.Module, slices: RowSlices | None) -> None:
    """Have a scoring module run its rows over several processes. UserError for a model that cannot."""
    if slices is None:
        return
    spec, config = module.spec, native(module.model).config  # type: ignore[arg-type]
    told = f"--sequence_parallel_size {slices.size}"
    if spec.block_size:  # type: ignore[union-attr]
        raise UserError(f"{told}: clean tokens that the blocks of {spec.name} look back on lie in no row")  # type: ignore[union-attr]
    if config.num_attention_heads % slices.size:
        raise UserError(f"{told} does not divide the {config.num_attention_heads} heads of the model; give a divisor")
    module.slices = slices  # type: ignore[assignment]
