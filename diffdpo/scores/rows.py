"""Noisy rows through a module: one forward of all of them, or segment by segment without a graph.

Shape suffixes: R rows, M scored positions.
"""

from collections.abc import Callable

import torch

from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import row_scores
from diffdpo.scores.segments import Segments, in_order
from diffdpo.scores.shared_clean import KeptClean, clean_inputs, run_clean


def forward_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows, kept: KeptClean | None = None) -> torch.Tensor:
    """f_R of all rows in one forward of the module; ``kept``: the clean tokens they look back on, run before."""
    inputs = (rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)
    return row_scores(forward(*inputs, *clean_inputs(rows, kept)), rows)


@torch.no_grad()
def score_rows(forward: Callable[..., torch.Tensor], rows: NoisyRows, *, segments: Segments) -> torch.Tensor:
    """f_R without a graph, segment by segment."""
    pieces, values = [], []
    for group in segments.by_stream(rows):
        kept = run_clean(forward, group)
        pieces += group
        values += [forward_rows(forward, piece.rows, kept) for piece in group]
    return in_order(pieces, values)
