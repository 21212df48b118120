"""Noisy rows through a module: one forward of all of them, or segment by segment without a graph.

Shape suffixes: R rows, M scored positions.
"""

from collections.abc import Callable

import torch

from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import row_scores
from diffdpo.scores.segments import Segments, in_order


def forward_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows) -> torch.Tensor:
    """f_R of all rows in one forward of the module."""
    logp_M = forward(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)
    return row_scores(logp_M, rows)


@torch.no_grad()
def score_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows, *, segments: Segments) -> torch.Tensor:
    """f_R without a graph, segment by segment."""
    pieces = segments(rows)
    return in_order(pieces, [forward_rows(forward, piece.rows) for piece in pieces])
