"""Block-causal attention with a clean stream that noisy rows share: what `[noisy | clean]` means, without its 2 L.

A noisy token sees the noisy tokens of its own block and the clean tokens of earlier blocks; a clean token sees the
clean tokens of its own block and of earlier ones. So clean tokens depend on nothing noisy, and all rows of an answer
share one stream of them; both answers of a pair share the blocks that they have in common (the prompt's, as a rule).

The stream is [clean | rows]: *nodes* of clean tokens (what a pair shares, then what is each answer's own), then the
rows, answer by answer. Either part may be run without the other: the clean one alone, whose keys and values are kept,
and later rows alone against them (`past`). Masks are [queries, keys] of one node or answer, shared by its rows, layers
and heads.

Shapes: A answers, N tokens of the stream, C clean tokens, R rows, S tokens of an answer's rows, H heads, G key/value
heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


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
    node_masks: tuple[Tensor, ...]
    group_masks: tuple[Tensor, ...]
    past: Sequence[tuple[Tensor, Tensor]] | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    layer: int = 0

    def __len__(self) -> int:
        return self.positions_N.shape[0]

    def at(self, layer: int) -> "BlockLayout":
        """As the layer of this number sees it."""
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
        for node, mask in zip(self.stream.nodes if self.clean_tokens else (), self.node_masks, strict=True):
            k, v = (torch.cat([t[place] for place in (*node.before, node.place)]) for t in (k_C, v_C))
            outputs.append(_attention(q_C[node.place][None], k[None], v[None], mask).flatten(0, 1))
        return outputs

    def _rows(self, q_N: Tensor, k_N: Tensor, v_N: Tensor, k_C: Tensor, v_C: Tensor) -> list[Tensor]:
        outputs = []
        for group, mask in zip(self.groups, self.group_masks, strict=True):
            place = slice(group.start, group.start + group.rows * group.width)
            q, k, v = (t[place].unflatten(0, (group.rows, group.width)) for t in (q_N, k_N, v_N))
            path = self.stream.path_A[group.answer]
            if path:
                seen_k, seen_v = (torch.cat([t[part] for part in path]) for t in (k_C, v_C))
                k, v = (
                    torch.cat([seen.expand(group.rows, -1, -1, -1), own], 1) for seen, own in ((seen_k, k), (seen_v, v))
                )
            outputs.append(_attention(q, k, v, mask).flatten(0, 1))
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
) -> BlockLayout:
    """The layout of rows (none: the clean part alone) over the clean tokens of the answers `stream_A`.

    `row_width`, `clean_width`: T of the padded rows and of the padded clean ids. `keep`: keep keys and values.
    """
    lengths, starts = length_A.tolist(), start_A.tolist()
    stream = clean_stream(stream_A.tolist(), lengths, shared_A.tolist())
    run_clean = past is None
    clean_index = [
        torch.arange(node.first, node.last) + node.answer * clean_width for node in stream.nodes if run_clean
    ]
    positions = [torch.arange(node.first, node.last) for node in stream.nodes if run_clean]
    node_masks = [_clean_mask(node, block_size).to(device) for node in stream.nodes if run_clean]
    members: dict[int, list[int]] = {}
    for row, answer in enumerate(answer_R.tolist()):
        members.setdefault(answer, []).append(row)
    groups, row_index, group_masks = [], [], []
    offset_R, start = torch.zeros(len(lengths_R), dtype=torch.long), 0
    row_lengths = lengths_R.tolist()
    for answer, rows in members.items():
        width = row_lengths[rows[0]]
        columns, row = torch.arange(width), torch.tensor(rows)
        groups.append(RowGroup(answer, start, len(rows), width))
        row_index.append((row[:, None] * row_width + columns).flatten())
        positions.append((columns + starts[answer]).repeat(len(rows)))
        offset_R[row] = start + width * torch.arange(len(rows))
        group_masks.append(_row_mask(starts[answer], width, lengths[answer], block_size).to(device))
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
        node_masks=tuple(node_masks),
        group_masks=tuple(group_masks),
        past=past,
        kept={} if keep else None,
    )


def _clean_mask(node: Node, block_size: int) -> Tensor:
    """[size, last]: blocks up to a token's own."""
    query, key = torch.arange(node.first, node.last) // block_size, torch.arange(node.last) // block_size
    return query[:, None] >= key


def _row_mask(start: int, width: int, clean: int, block_size: int) -> Tensor:
    """[width, clean + width]: clean blocks before a token's own, then the row's own block."""
    query, key = torch.arange(start, start + width) // block_size, torch.arange(clean) // block_size
    return torch.cat([query[:, None] > key, query[:, None] == query], 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [R, S, H, D], k and v [R, S', G, D], mask [S, S'] → [R, S, H*D]."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)
