"""Noisy rows without data: every row as long as the longest, with all its scored positions, on the meta device.

What the code asks numbers of stays real and on the CPU: whose row it is, and of a block-causal family where its clean
tokens lie.

Shapes: R rows, T tokens of a row, M scored positions, A answers, S rows of a segment.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from diffdpo.noise.rows import CleanAnswers, NoisyRows
from diffdpo.planner.job import PlannedRun
from diffdpo.scores.segments import Segment


@dataclass(frozen=True, kw_only=True)
class MetaRows(NoisyRows):
    """Rows that are all alike, so any of them are as many rows of the same kind."""

    job: PlannedRun

    def taken(self, index_S: torch.Tensor) -> "NoisyRows":
        """As many rows, of the same answers."""
        return replace(meta_rows(self.answer_R[index_S], self.job), clean=self.clean)


def meta_rows(answer_R: torch.Tensor, job: PlannedRun) -> MetaRows:
    """A row for each of ``answer_R``, real and ascending from 0."""
    count = len(answer_R)
    value_M, row_R = torch.empty(count * job.scored, device="meta"), torch.empty(count, device="meta")
    index_M, index_R = value_M.long(), row_R.long()
    answers = int(answer_R.max()) + 1 if count else 0
    return MetaRows(
        input_ids_RT=torch.empty(count, job.row_length, dtype=torch.long, device="meta"),
        lengths_R=index_R,
        answer_R=answer_R,
        weight_R=row_R,
        share_R=row_R,
        row_M=index_M,
        position_M=index_M,
        target_M=index_M,
        scale_M=value_M,
        tokens_A=index_R,
        block_R=index_R,
        cell_R=index_R,
        clean=_clean(answers + answers % 2, job) if job.block_size else None,
        job=job,
    )


def _clean(answers: int, job: PlannedRun) -> CleanAnswers:
    """The clean answers of whole pairs, which have the prompt's whole blocks in common."""
    one_A = torch.ones(answers, dtype=torch.long)
    ids_AT = torch.empty(answers, job.length, dtype=torch.long, device="meta")
    return CleanAnswers(ids_AT, one_A * job.clean_length, one_A * job.start, one_A * job.start)


class MetaSegments:
    """As `diffdpo.scores.segments.Segments` cuts rows of equal length: into so many ``pieces``; ``together``: those of
    a pair, which share its clean tokens."""

    def __init__(self, job: PlannedRun, pieces: int, *, together: bool):
        self.pieces, self.together = pieces, together
        self.world: Any = None if job.shares_clean else object()  # not None: every segment runs its own clean tokens

    def __call__(self, rows: NoisyRows) -> list[Segment]:
        """Equal pieces of the rows, answer by answer."""
        return [Segment(rows, index_S) for index_S in torch.arange(len(rows)).chunk(self.pieces)]

    def by_stream(self, rows: NoisyRows) -> list[list[Segment]]:
        """The pieces together or each by itself."""
        return [self(rows)] if self.together else [[piece] for piece in self(rows)]

    def whole(self, rows: Any) -> Any:
        return rows

    def by_answer(self, rows: NoisyRows) -> list[list[Segment]]:
        """The pieces of the two answers of a pair."""
        halves = torch.arange(len(rows)).chunk(2)
        return [[Segment(rows, index_S) for index_S in half_S.chunk(self.pieces)] for half_S in halves]
