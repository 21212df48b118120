"""Segments: the rows of a micro-batch cut into forwards of bounded size.

Rows are sorted by length first, so that those of one forward are alike and hardly any padding is computed, and are
then packed up to a number of tokens (or of rows). Rows of one answer stand so that any few neighbours have about as
many masked tokens. How many segments that takes depends on the data; where ranks must
call the model equally often (sharded weights or gradients) they agree on the largest number, and a rank with fewer
adds segments of one token with nothing to score.

Shape suffixes: R rows, S rows of one segment, A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu
from diffdpo.noise.rows import NoisyRows
from diffdpo.settings.segments import SegmentSettings

SEGMENT_TOKENS, ON_GPU = 8192, 16384  # tokens of a forward that segments are cut to by default


@dataclass(frozen=True)
class Segment:
    """Rows of one forward. ``index_S``: where they stand in the micro-batch; empty for a segment that fills up."""

    micro_batch: NoisyRows
    index_S: torch.Tensor

    @property
    def rows(self) -> NoisyRows:
        """Cut out anew each time: held beside the micro-batch, segments would double what n rows take."""
        return self.micro_batch.taken(self.index_S) if len(self.index_S) else self.micro_batch.nothing()

    def of(self, value_R: torch.Tensor) -> torch.Tensor:
        """The values of the micro-batch's rows that belong to this segment's rows; 0 for a row that fills up."""
        return value_R[self.index_S] if len(self.index_S) else value_R.new_zeros(1)


@dataclass(frozen=True)
class Size:
    """The most rows, and the most tokens, of any segment."""

    rows: int
    tokens: int


class Segments:
    """Cuts rows by ``tokens`` of one forward, or by ``rows`` where that is given (0 and 0: one forward).

    One object serves policy and reference of training, another those of evaluation, so that both follow when it is
    made smaller. ``equal_over``: the processes that must all cut into as many segments. ``turns``: (index, size) in a
    group of processes that run each other's rows together: one's segments come after the other's, with nothing of its
    own beside them.
    """

    def __init__(
        self, *, rows: int = 0, tokens: int = 0, equal_over: World | None = None, turns: tuple[int, int] = (0, 1)
    ):
        self.rows, self.tokens = rows, 0 if rows else tokens
        self.world, self.turns = equal_over, turns
        self.most = Size(0, 0)  # of the micro-batch cut last
        self.answers_apart = False  # always as ``by_answer``, whoever asks: equal shapes give equal roundings

    def __call__(self, rows: NoisyRows) -> list[Segment]:
        """The micro-batch's rows, longest first; answer by answer where they are kept apart."""
        if self.answers_apart:
            return [segment for own in self.by_answer(rows) for segment in own]
        order_R = _by_length(rows)
        self.most = Size(0, 0)
        segments = self._cut(rows, order_R)
        before, after = self._fillers(len(segments))
        nothing = Segment(rows, order_R[:0])
        return [nothing] * before + segments + [nothing] * after

    def by_answer(self, rows: NoisyRows) -> list[list[Segment]]:
        """The segments of each answer: none holds rows of two."""
        order_R = _spread(rows)
        counts = torch.bincount(rows.answer_R, minlength=rows.num_answers).tolist()
        self.most = Size(0, 0)
        answers = [self._cut(rows, own_R) for own_R in order_R.split(counts)]
        before, after = self._fillers(sum(map(len, answers)))
        nothing = Segment(rows, order_R[:0])
        answers[0] = [nothing] * before + answers[0]
        answers[-1] = answers[-1] + [nothing] * after
        return answers

    def by_stream(self, rows: NoisyRows) -> list[list[Segment]]:
        """The segments of a micro-batch, those together that share a clean stream (``scores.shared_clean``).

        Of a block-causal family: as many pairs as fit in one segment with their clean tokens, or one pair in several.
        Of others, and where processes must cut alike, every segment is by itself.
        """
        if rows.clean is None or self.world is not None:
            return [[segment] for segment in self(rows)]
        self.most = Size(0, 0)
        order_R, lengths = _spread(rows), rows.lengths_R.tolist()
        own_P = order_R.split(torch.bincount(rows.answer_R // 2, minlength=rows.num_answers // 2).tolist())
        clean_P = (rows.clean.length_A.view(-1, 2).sum(1) - rows.clean.shared_A[::2]).tolist()
        groups: list[list[Segment]] = []
        open_rows, held = order_R[:0], Size(0, 0)
        for own_R, clean in zip(own_P, clean_P, strict=True):
            cost = Size(len(own_R), clean + sum(lengths[row] for row in own_R.tolist()))
            if len(open_rows) and self._full(Size(held.rows + cost.rows, held.tokens + cost.tokens)):
                groups.append([Segment(rows, open_rows)])
                open_rows, held = order_R[:0], Size(0, 0)
            if self._full(cost):
                groups.append(self._cut(rows, own_R))
                continue
            open_rows, held = torch.cat([open_rows, own_R]), Size(held.rows + cost.rows, held.tokens + cost.tokens)
            self.most = Size(max(self.most.rows, held.rows), max(self.most.tokens, held.tokens))
        return groups + ([[Segment(rows, open_rows)]] if len(open_rows) else [])

    def _full(self, size: Size) -> bool:
        return size.rows > self.rows if self.rows else bool(self.tokens) and size.tokens > self.tokens

    def fit(self, lengths: Sequence[int]) -> int:
        """Segments that rows of these lengths take."""
        return len(self._cuts(sorted(lengths, reverse=True)))

    def one(self, rows: NoisyRows) -> bool:
        """Whether one segment holds all rows, on every process that must cut into as many."""
        if rows.clean is not None and self.world is None:
            groups = self.by_stream(rows)
            return len(groups) == 1 and len(groups[0]) == 1
        count = self.fit(rows.lengths_R.tolist())
        return self.turns[1] == 1 and count + self._missing(count) == 1

    def whole(self, rows: NoisyRows) -> NoisyRows:
        """All rows as one segment, whatever the size."""
        self.most = Size(len(rows), int(rows.lengths_R.sum()))
        return rows

    def resize(self, tokens: int) -> None:
        """Cut by so many tokens from now on."""
        self.rows, self.tokens = 0, tokens

    def halve(self, most: Size) -> bool:
        """Half of the size that was too large (``most``) from now on; False where that was a single row."""
        if most.rows <= 1:
            return False
        if self.rows:
            self.rows = min(self.rows, most.rows) // 2
        else:
            self.tokens = min(self.tokens or most.tokens, most.tokens) // 2
        return True

    def sizes(self) -> dict[str, int]:
        """What the shapes of the forwards follow from."""
        return {"segment_rows": self.rows, "segment_tokens": self.tokens}

    def describe(self) -> str:
        """The size of a segment, in words for the user."""
        if self.rows:
            return f"{self.rows} rows a segment"
        return f"up to {self.tokens} tokens a segment" if self.tokens else "one segment"

    def _cut(self, rows: NoisyRows, order_R: torch.Tensor) -> list[Segment]:
        lengths = rows.lengths_R[order_R].tolist()
        cuts = self._cuts(lengths)
        for start, stop in cuts:
            self.most = Size(max(self.most.rows, stop - start), max(self.most.tokens, sum(lengths[start:stop])))
        return [Segment(rows, order_R[start:stop]) for start, stop in cuts]

    def _cuts(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Consecutive (start, stop): as many rows as fit, at least one."""
        cuts, start, tokens = [], 0, 0
        for row, length in enumerate(lengths):
            full = row - start == self.rows if self.rows else self.tokens and tokens + length > self.tokens
            if row > start and full:
                cuts.append((start, row))
                start, tokens = row, 0
            tokens += length
        return [*cuts, (start, len(lengths))]

    def _fillers(self, own: int) -> tuple[int, int]:
        """How many segments with nothing to score come before and after ``own`` ones."""
        index, size = self.turns
        most = own + self._missing(own)
        return index * most, (size - index) * most - own

    def _missing(self, own: int) -> int:
        return self.world.all_reduce_max(own) - own if self.world is not None else 0


def make_segments(
    settings: SegmentSettings,
    choice: EngineChoice,
    device: torch.device,
    *,
    world: World | None = None,
    in_training: bool = False,
) -> Segments:
    """How rows are cut into forwards: ``--segment_rows``, or as many as keep a forward to a number of tokens.

    ``world``: the processes of the run, None for one. They must cut into as many segments where they meet in forwards
    (parameters in shards) or, ``in_training``, in backwards (gradients in shards).
    """
    meets = choice.meets_in_forwards or (in_training and choice.sharding.gradients)
    share = choice.row_processes
    return Segments(
        rows=settings.segment_rows,
        tokens=share * (ON_GPU if is_gpu(device) else SEGMENT_TOKENS),
        equal_over=world if meets and world is not None and world.size > 1 else None,
        turns=(world.rank % share, share) if world is not None else (0, 1),
    )


def _spread(rows: NoisyRows) -> torch.Tensor:
    """Rows answer by answer, within one by turns the most and the least masked of those that are left.

    Logits are made of masked tokens, so a segment's memory depends on how many it has: this makes them alike.
    """
    masked_R = torch.bincount(rows.row_M, minlength=len(rows)).tolist()
    members: list[list[int]] = [[] for _ in range(rows.num_answers)]
    for row, answer in enumerate(rows.answer_R.tolist()):
        members[answer].append(row)
    order = []
    for own in members:
        own.sort(key=lambda row: -masked_R[row])
        half = (len(own) + 1) // 2
        both = zip_longest(own[:half], reversed(own[half:]))
        order += [row for pair in both for row in pair if row is not None]
    return torch.tensor(order, device=rows.row_M.device)


def _by_length(rows: NoisyRows) -> torch.Tensor:
    """The answers with long rows first."""
    order_R = _spread(rows)
    return order_R[rows.lengths_R[order_R].argsort(descending=True, stable=True)]


def in_order(segments: Sequence[Segment], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """value_R of the micro-batch from the values of each segment's rows; differentiable."""
    own = [
        (segment.index_S, value_S) for segment, value_S in zip(segments, values, strict=True) if len(segment.index_S)
    ]
    index_R, value_R = torch.cat([index_S for index_S, _ in own]), torch.cat([value_S for _, value_S in own])
    return value_R[index_R.argsort()]
