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
from diffdpo.planner.job import PlannedRun
from diffdpo.planner.kernels import device_kernels
from diffdpo.planner.meta_rows import MetaSegments, meta_rows
from diffdpo.planner.shapes import Numbers
from diffdpo.planner.trace import Ledger, Trace, Work
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.step.backward import STRATEGIES

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class DryRun:
    """What was seen of one micro-batch: ``policy`` and ``reference`` traces (live bytes), and the work of each."""

    policy: Trace
    reference: Trace | None
    policy_work: Counter[Work]
    reference_work: Counter[Work]


class DryEngine:
    """Stands in for the engine: gradients stay in ``.grad``, or leave through a bucket as in ZeRO-2 and ZeRO-3, or at
    once as in FSDP2 (whose buffers are counted on their own)."""

    loss_factor = 1.0

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
    """Peak and work of a micro-batch. More than two segments (``deferred``: two an answer; of a pair that shares clean
    tokens: three) add nothing to the peak; their work is extrapolated. Without ``timed`` the work is that of the pieces
    run, for when only the peak matters."""
    several = job.segments > 1 or job.backwards > 1
    few = 2 if job.splits_pairs and job.strategy != "deferred" else 1  # one would run its clean tokens in its own graph
    once = _policy(module, numbers, job, pieces=few) if timed or not several else None
    more = _policy(module, numbers, job, pieces=few + 1) if several or once is None else once
    work = Counter((once or more).work)
    if once and job.segments > 1:
        work = _extrapolated(once, more, few, _pieces(job), times=job.pairs if job.splits_pairs else 1)
    reference, reference_work = None, Counter[Work]()
    if job.reference in ("copy", "adapter_off", "adapter_start"):
        reference, reference_work = _reference_run(module, numbers, job)
    return DryRun(more, reference, work, reference_work)


def _pieces(job: PlannedRun) -> float:
    """Segments that `_policy` would have to run for all rows: of a micro-batch, or of a pair that shares clean tokens;
    under ``deferred`` of an answer."""
    rows = job.pair_rows if job.splits_pairs else job.rows
    return rows / ((2 if job.strategy == "deferred" else 1) * job.rows_at_once)


def _extrapolated(once: Trace, more: Trace, few: int, pieces: float, *, times: int = 1) -> Counter[Work]:
    """The work of so many ``pieces``, from that of ``few`` and of one more."""
    kinds = set(once.work) | set(more.work)
    return Counter({k: round(times * (once.work[k] + (pieces - few) * (more.work[k] - once.work[k]))) for k in kinds})


def _reference_run(module: MaskedLogProbs, numbers: Numbers, job: PlannedRun) -> tuple[Trace, Counter[Work]]:
    if job.shares_clean and not job.pairs_in_segment:
        once, more = (_reference(module, numbers, job, pieces=pieces) for pieces in (2, 3))
        pieces = job.pair_rows / job.reference_rows
        return more, _extrapolated(once, more, 2, pieces, times=job.pairs)
    trace = _reference(module, numbers, job, pieces=1)
    passes = job.rows / job.reference_rows
    return trace, Counter({kind: round(times * passes) for kind, times in trace.work.items()})


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
    many = job.splits_pairs or job.segments > (2 * job.pairs if job.strategy == "deferred" else 1)
    micro_batches, pieces = (1, pieces) if many else (pieces, 1)
    segments: Any = MetaSegments(job, pieces, together=job.splits_pairs)
    with device_kernels(cuda=job.cuda), ledger:
        engine: Any = DryEngine(module, job, ledger)
        for index in range(micro_batches):
            rows = meta_rows(_answers(job, pieces), job)
            last = index == micro_batches - 1
            STRATEGIES[job.strategy](engine, rows, torch.sum, segments=segments, last=last)
            del rows
        engine.close()
    return ledger.trace


def _answers(job: PlannedRun, pieces: int) -> torch.Tensor:
    """Whose rows `_policy` runs: two answers' where a pair is taken apart, else whole answers' one after the other."""
    if job.splits_pairs or job.strategy == "deferred":
        count = (2 if job.strategy == "deferred" else 1) * pieces * job.rows_at_once
        return torch.arange(count) * 2 // count
    return torch.arange(pieces * job.rows_at_once) // job.rows_per_answer


def _reference(module: MaskedLogProbs, numbers: Numbers, job: PlannedRun, *, pieces: int) -> Trace:
    """``pieces`` segments: of one pair where there are several."""
    ledger = _ledger(module, numbers)
    off = module.model.disable_adapter() if job.reference == "adapter_off" else nullcontext()  # type: ignore[operator]
    count = pieces * job.reference_rows
    answer_R = torch.arange(count) * 2 // count if pieces > 1 else torch.arange(count) // job.rows_per_answer
    segments: Any = MetaSegments(job, pieces, together=pieces > 1)
    with device_kernels(cuda=job.cuda), ledger, off:
        engine = DryEngine(module, job, ledger)
        score_rows(engine, meta_rows(answer_R, job), segments=segments)
        engine.close()
    return ledger.trace
