"""Block-causal attention with a clean stream that noisy rows share: what `[noisy | clean]` means, without its 2 L.

A noisy token sees the noisy tokens of its own block and the clean tokens of earlier blocks; a clean token sees the
clean tokens of its own block and of earlier ones. So clean tokens depend on nothing noisy, and all rows of an answer
share one stream of them; both answers of a pair share the blocks that they have in common (the prompt's, as a rule).

The stream is [clean | rows]: *nodes* of clean tokens (what a pair shares, then what is each answer's own), then the
rows, answer by answer. Either part may be run without the other: the clean one alone, whose keys and values are kept,
and later rows alone against them (`past`). Masks are [queries, keys] of a chunk of a node or answer, shared by its
rows, layers and heads.

Shapes: A answers, N tokens of the stream, C clean tokens, R rows, S tokens of an answer's rows, H heads, G key/value
heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.block_attention import LAST, Hiding, Visibility, hidden_attention

CHUNK = 512
"""Queries that attend together, on the CPU: half of a block-causal mask hides, and what all of them do not see is left
out."""


@dataclass(frozen=True)
class Node:
    """Clean tokens first .. last of an answer, at `start` of the stream; all whole blocks. `before`: those that come
    before them, in the stream."""

    answer: int
    first: int
    last: int
    start: int
    before: tuple[slice, ...]

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class CleanStream:
    """The clean part of a stream. `path_A`: where the clean tokens of each answer lie in it, in order."""

    nodes: tuple[Node, ...]
    path_A: dict[int, tuple[slice, ...]]

    @cached_property
    def size(self) -> int:
        return sum(node.size for node in self.nodes)

    def index(self, answer: int) -> Tensor:
        """Stream positions of the answer's clean tokens."""
        places = [torch.arange(place.start, place.stop) for place in self.path_A[answer]]
        return torch.cat(places) if places else torch.empty(0, dtype=torch.long)


def clean_stream(answers: Sequence[int], length_A: Sequence[int], shared_A: Sequence[int]) -> CleanStream:
    """The clean tokens of these answers (ascending; 2 b and 2 b + 1 are a pair's), what both have in common once."""
    nodes: list[Node] = []
    paths: dict[int, tuple[slice, ...]] = {}

    def add(answer: int, first: int, last: int, before: tuple[slice, ...]) -> tuple[slice, ...]:
        if first == last:
            return before
        start = nodes[-1].place.stop if nodes else 0
        nodes.append(Node(answer, first, last, start, before))
        return (*before, nodes[-1].place)

    for answer in answers:
        shared = shared_A[answer] if answer ^ 1 in answers else 0
        chosen = answer & ~1
        if shared and answer == chosen:
            paths[-1] = add(answer, 0, shared, ())  # of the pair, until its second answer has come
        before = paths[-1] if shared else ()
        paths[answer] = add(answer, shared, length_A[answer], before)
    paths.pop(-1, None)
    return CleanStream(tuple(nodes), paths)


@dataclass(frozen=True)
class RowGroup:
    """Rows of one answer, equally long: `rows x width` tokens at `start` of the rows' part."""

    answer: int
    start: int
    rows: int
    width: int


@dataclass(frozen=True)
class Chunk:
    """Some whole blocks of queries, `own` of their node or rows, that see no more than the first `clean` clean tokens
    of their path (and, in rows, themselves): what is behind is not computed. `hiding`: what is, [queries, keys]."""

    own: slice
    clean: int
    hiding: Hiding


@dataclass(frozen=True)
class BlockLayout:
    """[clean | rows], or with `past` the rows alone against each layer's keys and values of a clean stream run before.

    `index_N`: where the stream's tokens are in the flattened [A, T] clean ids (the first `clean_tokens` of the stream)
    and in the flattened [R, T] rows. `offset_R`: of each row in the rows' part. `kept`: filled with each layer's keys
    and values of the clean tokens, where it is given.
    """

    stream: CleanStream
    groups: tuple[RowGroup, ...]
    clean_index: Tensor
    row_index: Tensor
    offset_R: Tensor
    positions_N: Tensor
    max_length: int
    clean_tokens: int
    node_chunks: tuple[tuple["Chunk", ...], ...]
    group_chunks: tuple[tuple["Chunk", ...], ...]
    past: Sequence[tuple[Tensor, Tensor]] | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    layer: int = 0

    def __len__(self) -> int:
        return self.positions_N.shape[0]

    def at(self, layer: int) -> "BlockLayout":
        """The layout as the layer of this number sees it."""
        return replace(self, layer=layer)

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        """Block-causal attention of the whole stream; grouped-query when G < H. Returns [N, H*D]."""
        q_C, q_row = q_NHD.split([self.clean_tokens, len(self) - self.clean_tokens])
        k_C, k_row = k_NGD.split([self.clean_tokens, len(self) - self.clean_tokens])
        v_C, v_row = v_NGD.split([self.clean_tokens, len(self) - self.clean_tokens])
        if self.kept is not None and self.layer not in self.kept:  # a checkpoint's second forward keeps nothing
            self.kept[self.layer] = (k_C, v_C)
        outputs = self._clean(q_C, k_C, v_C)
        if self.past is not None:
            k_C, v_C = self.past[self.layer]
        outputs += self._rows(q_row, k_row, v_row, k_C, v_C)
        return torch.cat(outputs) if outputs else q_NHD.flatten(1)

    def _clean(self, q_C: Tensor, k_C: Tensor, v_C: Tensor) -> list[Tensor]:
        outputs = []
        for node, chunks in zip(self.stream.nodes if self.clean_tokens else (), self.node_chunks, strict=True):
            k, v = (torch.cat([t[place] for place in (*node.before, node.place)]) for t in (k_C, v_C))
            q, seen = q_C[node.place][None], [chunk.clean for chunk in chunks]
            for chunk, own_k, own_v in zip(chunks, prefixes(k, seen), prefixes(v, seen), strict=True):
                outputs.append(hidden_attention(q[:, chunk.own], own_k[None], own_v[None], chunk.hiding).flatten(0, 1))
        return outputs

    def _rows(self, q_N: Tensor, k_N: Tensor, v_N: Tensor, k_C: Tensor, v_C: Tensor) -> list[Tensor]:
        outputs = []
        for group, chunks in zip(self.groups, self.group_chunks, strict=True):
            place = slice(group.start, group.start + group.rows * group.width)
            q, k, v = (t[place].unflatten(0, (group.rows, group.width)) for t in (q_N, k_N, v_N))
            path = self.stream.path_A[group.answer]
            seen_k, seen_v = (torch.cat([t[part] for part in path]) if path else t[:0] for t in (k_C, v_C))
            seen, parts = [chunk.clean for chunk in chunks], []
            for chunk, clean_k, clean_v in zip(chunks, prefixes(seen_k, seen), prefixes(seen_v, seen), strict=True):
                keys, values = (
                    torch.cat([clean.expand(group.rows, -1, -1, -1), own[:, chunk.own]], 1)
                    for clean, own in ((clean_k, k), (clean_v, v))
                )
                parts.append(hidden_attention(q[:, chunk.own], keys, values, chunk.hiding))
            outputs.append(torch.cat(parts, 1).flatten(0, 1))
        return outputs


def block_layout(
    *,
    block_size: int,
    answer_R: Tensor,
    lengths_R: Tensor,
    stream_A: Tensor,
    length_A: Tensor,
    start_A: Tensor,
    shared_A: Tensor,
    row_width: int,
    clean_width: int,
    device: torch.device,
    past: Sequence[tuple[Tensor, Tensor]] | None = None,
    keep: bool = False,
    flex: bool = False,
) -> BlockLayout:
    """The layout of rows (none: the clean part alone) over the clean tokens of the answers `stream_A`.

    `row_width`, `clean_width`: T of the padded rows and of the padded clean ids. `keep`: keep keys and values.
    `flex`: what is hidden is hidden by FlexAttention.
    """
    lengths, starts = length_A.tolist(), start_A.tolist()
    stream = clean_stream(stream_A.tolist(), lengths, shared_A.tolist())
    run_clean = past is None
    clean_index = [
        torch.arange(node.first, node.last) + node.answer * clean_width for node in stream.nodes if run_clean
    ]
    positions = [torch.arange(node.first, node.last) for node in stream.nodes if run_clean]
    node_chunks = [_node_chunks(node, block_size, device, flex) for node in stream.nodes if run_clean]
    members: dict[int, list[int]] = {}
    for row, answer in enumerate(answer_R.tolist()):
        members.setdefault(answer, []).append(row)
    groups, row_index, group_chunks = [], [], []
    offset_R, start = torch.zeros(len(lengths_R), dtype=torch.long), 0
    row_lengths = lengths_R.tolist()
    for answer, rows in members.items():
        width = row_lengths[rows[0]]
        columns, row_G = torch.arange(width), torch.tensor(rows)
        groups.append(RowGroup(answer, start, len(rows), width))
        row_index.append((row_G[:, None] * row_width + columns).flatten())
        positions.append((columns + starts[answer]).repeat(len(rows)))
        offset_R[row_G] = start + width * torch.arange(len(rows))
        group_chunks.append(_row_chunks(starts[answer], width, lengths[answer], block_size, device, flex))
        start += len(rows) * width
    nothing = [torch.empty(0, dtype=torch.long)]
    positions_N = torch.cat(positions or nothing)
    return BlockLayout(
        stream=stream,
        groups=tuple(groups),
        clean_index=torch.cat(clean_index or nothing).to(device),
        row_index=torch.cat(row_index or nothing).to(device),
        offset_R=offset_R.to(device),
        positions_N=positions_N.to(device),
        max_length=1 + int(positions_N.max()) if len(positions_N) else 1,
        clean_tokens=stream.size if run_clean else 0,
        node_chunks=tuple(node_chunks),
        group_chunks=tuple(group_chunks),
        past=past,
        kept={} if keep else None,
    )


def _node_chunks(node: Node, block_size: int, device: torch.device, flex: bool) -> tuple[Chunk, ...]:
    """Clean tokens see the blocks up to their own."""
    chunks = []
    for own in _spans(node.size, block_size, device):
        first, last = node.first + own.start, node.first + own.stop
        key_K = torch.arange(last) // block_size
        chunks.append(Chunk(own, last, _hiding(key_K[first:], key_K, torch.full_like(key_K, LAST), device, flex)))
    return tuple(chunks)


def _row_chunks(
    start: int, width: int, clean: int, block_size: int, device: torch.device, flex: bool
) -> tuple[Chunk, ...]:
    """Noisy tokens see the clean blocks before their own, and their own block of the row."""
    chunks = []
    for own in _spans(width, block_size, device):
        query_S = torch.arange(start + own.start, start + own.stop) // block_size
        seen = min(clean, int(query_S[-1]) * block_size)
        clean_K = torch.arange(seen) // block_size
        first_K, last_K = torch.cat([clean_K + 1, query_S]), torch.cat([torch.full_like(clean_K, LAST), query_S])
        chunks.append(Chunk(own, seen, _hiding(query_S, first_K, last_K, device, flex)))
    return tuple(chunks)


def _hiding(query_S: Tensor, first_K: Tensor, last_K: Tensor, device: torch.device, flex: bool) -> Hiding:
    seen = Visibility(query_S.to(device), first_K.to(device), last_K.to(device))
    return seen.rule() if flex else seen.dense()


def _spans(size: int, block_size: int, device: torch.device) -> list[slice]:
    """Consecutive parts of about CHUNK tokens, in whole blocks; on a GPU one, as launches cost more than what is
    hidden there."""
    step = max(1, CHUNK // block_size) * block_size if not is_gpu(device) else max(1, size)
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def prefixes(value: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """value[:size] of every size."""
    return (value,) if list(sizes) == [len(value)] else _Prefixes.apply(value, *sizes)


class _Prefixes(torch.autograd.Function):
    """Slices whose gradients are added in one buffer: torch's own would fill one with zeros for every slice."""

    @staticmethod
    def forward(ctx, value, *sizes):
        ctx.shape, ctx.sizes = value.shape, sizes
        return tuple(value[:size] for size in sizes)

    @staticmethod
    def backward(ctx, *gradients):
        total = gradients[0].new_zeros(ctx.shape)
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            total[:size] += gradient
        return total, *(None for _ in ctx.sizes)
