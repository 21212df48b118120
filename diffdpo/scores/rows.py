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
    clean = clean_inputs(rows, rows.answer_R.unique()) if rows.clean is not None else ()
    logp_M = forward(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M, *clean)
    return row_scores(logp_M, rows)


def clean_inputs(rows: NoisyRows, stream_A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a block-causal module takes besides the rows; ``stream_A``: the answers whose clean tokens are run."""
    clean = rows.clean
    assert clean is not None, "of a block-causal family"
    return rows.answer_R, stream_A, clean.ids_AT, clean.length_A, clean.start_A, clean.shared_A


@torch.no_grad()
def score_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows, *, segments: Segments) -> torch.Tensor:
    """f_R without a graph, segment by segment."""
    pieces = segments(rows)
    return in_order(pieces, [forward_rows(forward, piece.rows) for piece in pieces])
