"""A job's forwards and backwards on the meta device, through the strategies of `diffdpo.step.backward` themselves.

Shapes: R rows, M scored positions.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffdpo.engine.base import trained_parameters
from diffdpo.noise.rows import NoisyRows
from diffdpo.planner.job import PlannedRun
from diffdpo.planner.kernels import device_kernels
from diffdpo.planner.shapes import Numbers
from diffdpo.planner.trace import Ledger, Trace, Work
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segment
from diffdpo.step.backward import STRATEGIES

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class DryRun:
    """Of one micro-batch: ``policy`` and ``reference`` traces (live bytes), and the work of each."""

    policy: Trace
    reference: Trace | None
    policy_work: Counter[Work]
    reference_work: Counter[Work]


def meta_rows(count: int, job: PlannedRun) -> NoisyRows:
    """``count`` rows, all as long as the longest, with all their scored positions."""
    value_M = torch.empty(count * job.scored, device="meta")
    row_R = torch.empty(count, device="meta")
    ids_RT = torch.empty(count, job.length, dtype=torch.long, device="meta")
    index_M, index_R = value_M.long(), row_R.long()
    return NoisyRows(
        input_ids_RT=ids_RT,
        lengths_R=index_R,
        answer_R=index_R,
        weight_R=row_R,
        share_R=row_R,
        row_M=index_M,
        position_M=index_M,
        target_M=index_M,
        scale_M=value_M,
        tokens_A=index_R,
        block_R=index_R,
        cell_R=index_R,
    )


class MetaSegment(Segment):
    """A segment that is given whole: on the meta device nothing can be cut by its values."""

    @property
    def rows(self) -> NoisyRows:
        """What it was made of."""
        return self.micro_batch


class MetaSegments:
    """As `diffdpo.scores.segments.Segments` cuts rows of equal length."""

    def __init__(self, job: PlannedRun, segments: int):
        self.job, self.segments = job, segments

    def __call__(self, rows: NoisyRows) -> list[Segment]:
        """Equal pieces of the rows."""
        count = len(rows) // self.segments
        return [self._piece(count) for _ in range(self.segments)]

    def by_stream(self, rows: NoisyRows) -> list[list[Segment]]:
        """Each by itself: attention is full."""
        return [[piece] for piece in self(rows)]

    def whole(self, rows: Any) -> Any:
        return rows

    def by_answer(self, rows: NoisyRows) -> list[list[Segment]]:
        """The pieces of the two answers of a pair."""
        return [self(rows), self(rows)]

    def _piece(self, count: int) -> Segment:
        return MetaSegment(meta_rows(count, self.job), torch.empty(count, dtype=torch.long, device="meta"))


class DryEngine:
    """Stands in for the engine: gradients stay in ``.grad``, or leave through a bucket as in ZeRO-2 and ZeRO-3, or at
    once as in FSDP2 (whose buffers are counted on their own)."""

    def __init__(self, module: MaskedLogProbs, job: PlannedRun, ledger: Ledger):
        self.module, self.ledger = module, ledger
        self.parameters = trained_parameters(module)
        self.choice, cut = job.choice, job.sharding
        self.bucketed = cut.gradients and job.strategy != "deferred" and not job.adapter_is_whole
        self.bucket = cut.reduce_bucket
        self.offload = cut.offloads_optimizer
        self.sharded = cut.parameters
        self.world: Any = SimpleNamespace(size=1, rank=0, is_main=True, device=torch.device("meta"))
        self.waiting: list[torch.Tensor] = []  # gradients above the bucket's size, until the bucket is reduced
        self.kept: list[torch.Tensor] = []  # ... and until the backward ends where more backwards follow
        self.sizes: list[int] = []
        self.last = True
        hooks = [self._leave if self.bucketed else self._stay]
        self.handles = [
            parameter.register_post_accumulate_grad_hook(hook) for parameter in self.parameters for hook in hooks
        ]

    def __call__(self, ids_RT: torch.Tensor, lengths_R: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        rows, length = ids_RT.shape
        return self.module(ids_RT, torch.full((rows,), length), *inputs)  # the layout reads them: real numbers

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """The gradients of ``loss``, and where they go."""
        self.last = last
        loss.backward()
        self._reduce()
        self.kept.clear()

    def close(self) -> None:
        """Take the hooks and gradients off the module."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.parameters:
            parameter.grad = None

    def _stay(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.retag(parameter.grad, GRADIENTS)

    def _leave(self, parameter: torch.Tensor) -> None:
        """DeepSpeed's hook: copied into the bucket, which is counted on its own, or past it when too large."""
        assert parameter.grad is not None
        if self.sizes and sum(self.sizes) + parameter.numel() > self.bucket:
            self._reduce()
        if parameter.numel() > self.bucket:
            large = parameter.grad.clone() if self.offload and not self.sharded else parameter.grad
            self.ledger.retag(large, GRADIENTS)
            self.waiting.append(large)
        self.sizes.append(parameter.numel())
        parameter.grad = None

    def _reduce(self) -> None:
        """On its way to the host a bf16 gradient is an fp32 copy on the device, one parameter at a time. ZeRO-2 keeps
        what went past the bucket to the end of a backward that is not the last; ZeRO-3 lets it go."""
        if self.offload and self.last and self.sizes:
            example = self.parameters[0]
            if example.element_size() == 2:
                wide = torch.empty(max(self.sizes), dtype=torch.float32, device="meta")
                self.ledger.retag(wide, GRADIENTS)
        if not self.last and not self.sharded:
            self.kept += self.waiting
        self.waiting.clear()
        self.sizes.clear()


def dry_run(module: MaskedLogProbs, numbers: Numbers, job: PlannedRun, *, timed: bool = True) -> DryRun:
    """Peak and work of a micro-batch. More than two segments (``deferred``: two an answer) add nothing to the peak;
    their work is extrapolated. Without ``timed`` the work is that of the pieces run, for when only the peak matters."""
    several = job.segments > 1 or job.backwards > 1
    once = _policy(module, numbers, job, pieces=1) if timed or not several else None
    twice = _policy(module, numbers, job, pieces=2) if several or once is None else once
    work = Counter((once or twice).work)
    if once and job.segments > 1:
        answers = 2 if job.strategy == "deferred" else 1
        extra = job.rows / (answers * job.rows_at_once) - 1
        for kind in set(once.work) | set(twice.work):
            work[kind] += round(extra * (twice.work[kind] - once.work[kind]))
    reference, reference_work = None, Counter[Work]()
    if job.reference in ("copy", "adapter_off", "adapter_start"):
        reference = _reference(module, numbers, job)
        passes = job.rows / job.reference_rows
        reference_work = Counter({kind: round(times * passes) for kind, times in reference.work.items()})
    return DryRun(twice, reference, work, reference_work)


def _ledger(module: nn.Module, numbers: Numbers) -> Ledger:
    trained = {tuple(p.shape) for p in module.parameters() if p.requires_grad and p.ndim == 2}
    trained |= {shape[::-1] for shape in trained}

    def kind(tensor: torch.Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape in trained:
            return GRADIENTS
        return LOGITS if shape[-1:] == (numbers.vocabulary,) else ACTIVATIONS

    ledger = Ledger(kind)
    ledger.given(module.parameters())
    return ledger


def _policy(module: MaskedLogProbs, numbers: Numbers, job: PlannedRun, *, pieces: int) -> Trace:
    """``pieces`` segments of one micro-batch; of a strategy with one segment, as many micro-batches."""
    ledger = _ledger(module, numbers)
    many = job.segments > (2 * job.pairs if job.strategy == "deferred" else 1)
    micro_batches = 1 if many else pieces
    segments: Any = MetaSegments(job, pieces if many else 1)
    with device_kernels(cuda=job.cuda), ledger:
        engine: Any = DryEngine(module, job, ledger)
        for index in range(micro_batches):
            rows = meta_rows(job.rows_at_once * (pieces if many else 1), job)
            last = index == micro_batches - 1
            STRATEGIES[job.strategy](engine, rows, torch.sum, segments=segments, last=last)
            del rows
        engine.close()
    return ledger.trace


def _reference(module: MaskedLogProbs, numbers: Numbers, job: PlannedRun) -> Trace:
    ledger = _ledger(module, numbers)
    off = module.model.disable_adapter() if job.reference == "adapter_off" else nullcontext()  # type: ignore[operator]
    segments: Any = MetaSegments(job, 1)
    with device_kernels(cuda=job.cuda), ledger, off:
        engine = DryEngine(module, job, ledger)
        score_rows(engine, meta_rows(job.reference_rows, job), segments=segments)
        engine.close()
    return ledger.trace
