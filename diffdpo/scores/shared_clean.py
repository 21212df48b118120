"""One clean stream for all rows of a pair: run once, its keys and values kept, its gradient taken back once.

Under block-causal attention the clean tokens depend on nothing noisy. So a pair whose rows take several segments runs
its clean tokens once, what both answers have in common once, and each segment its rows alone: P + 2 (A + n A) tokens a
pair (prompt P, answers of A), where ``[noisy | clean]`` rows take 2 n · 2 (P + A). With gradients, what was kept is
handed to the segments as leaves; their gradients add up, in fp32, and go through the clean stream in one backward at
the end. The graph of the clean tokens lives meanwhile: memory that does not grow with n.

Where ranks must call the model equally often every segment runs the clean tokens of its own answers instead, in one
graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.segments import Segment


@dataclass(frozen=True)
class KeptClean:
    """What rows need of clean tokens run before: of the answers ``stream_A``, see ``block_log_probs``."""

    stream_A: torch.Tensor
    tensors: tuple[torch.Tensor, ...]


def clean_inputs(rows: NoisyRows, kept: KeptClean | None = None) -> tuple[torch.Tensor, ...]:
    """What a block-causal module takes besides the rows; none where attention is full."""
    if rows.clean is None:
        return ()
    clean, stream_A = rows.clean, rows.answer_R.unique() if kept is None else kept.stream_A
    own = (rows.answer_R, stream_A, clean.ids_AT, clean.length_A, clean.start_A, clean.shared_A)
    return own if kept is None else (*own, *kept.tensors)


def run_clean(forward: Callable[..., torch.Tensor], group: Sequence[Segment]) -> KeptClean | None:
    """The clean tokens of a group of segments run once; None for one segment, whose rows take theirs along."""
    if len(group) == 1:
        return None
    rows, index_R = group[0].micro_batch, torch.cat([piece.index_S for piece in group])
    stream_A, none = rows.answer_R[index_R].unique(), rows.taken(index_R[:0])
    inputs = (none.input_ids_RT, none.lengths_R, none.row_M, none.position_M, none.target_M)
    return KeptClean(stream_A, tuple(forward(*inputs, *clean_inputs(none, KeptClean(stream_A, ())))))


class CleanGradient:
    """The gradient of what was kept, added up over segments and taken back through the clean stream.

    ``leaves`` is what the segments are given. Where nothing that was kept depends on a trained parameter there is no
    way back, and ``trained`` is False. ``factor``: what an engine multiplies losses by, which would count twice here.
    """

    def __init__(self, kept: KeptClean, *, factor: float = 1.0):
        self.kept, self.engine_factor = kept, factor
        self.trained = any(tensor.requires_grad for tensor in kept.tensors)
        self.leaves = KeptClean(kept.stream_A, tuple(t.detach().requires_grad_(self.trained) for t in kept.tensors))
        self._sum: list[torch.Tensor | None] = [None] * len(kept.tensors)

    def collect(self) -> None:
        """Add the gradient that a segment's backward has left in the leaves."""
        for index, leaf in enumerate(self.leaves.tensors):
            if leaf.grad is not None:
                gradient = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))
                held = self._sum[index]
                self._sum[index] = gradient if held is None else held.add_(gradient)
                leaf.grad = None

    def taken(self) -> list[torch.Tensor | None]:
        """The sum so far; it starts from 0 again."""
        found, self._sum = self._sum, [None] * len(self._sum)
        return found

    def loss(self, *parts: tuple[float, Sequence[torch.Tensor | None]]) -> torch.Tensor:
        """A scalar whose gradient is that of the sum; of ``parts``, each (factor, sum), where they are given."""
        total = torch.zeros((), device=self.kept.tensors[0].device)
        for factor, sums in parts or ((1.0, self.taken()),):
            for tensor, gradient in zip(self.kept.tensors, sums, strict=True):
                if gradient is not None and tensor.requires_grad:
                    total = total + factor / self.engine_factor * (tensor * gradient.to(tensor.dtype)).sum()
        return total
