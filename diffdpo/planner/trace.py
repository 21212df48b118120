"""A training step run without data: the peak of its live bytes and the work it does, operation by operation.

The real module and the real strategy of `diffdpo.step.backward` run on the meta device under a dispatch mode that sees
every tensor come and go. So the figures follow the code: what autograd keeps, what a checkpoint drops, which gradients
accumulate until a backward's end, how the head is cut into chunks.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Classify = Callable[[Tensor], str]


@dataclass(frozen=True)
class Work:
    """One kind of operation: floating point operations and bytes read and written of each call."""

    flops: int
    bytes: int
    half: bool  # 16-bit operands


@dataclass
class Trace:
    """What a piece of a step needs. ``at_peak``: live bytes by kind when their sum was largest, given tensors (weights)
    not counted; ``left``: what still lives at the end."""

    at_peak: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    work: Counter[Work] = field(default_factory=Counter)

    @property
    def peak(self) -> int:
        """Largest sum of live bytes."""
        return sum(self.at_peak.values())

    @property
    def flops(self) -> int:
        """Floating point operations of matrix products and attention."""
        return sum(work.flops * times for work, times in self.work.items())


class Ledger(TorchDispatchMode):
    """Counts live bytes of meta tensors made inside it, and work."""

    def __init__(self, classify: Classify):
        super().__init__()
        self.classify = classify
        self.trace = Trace()
        self._live: Counter[str] = Counter()
        self._total = self._peak = 0
        self._known: dict[int, tuple[str, int]] = {}

    def given(self, tensors) -> None:
        """Tensors that are counted elsewhere."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = ("given", 0)

    def retag(self, tensor: Tensor, kind: str) -> None:
        """Book a live tensor under another kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            old, size = self._known[key]
            self._live[old] -= size
            self._live[kind] += size
            self._known[key] = (kind, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rule: Callable[..., Any] | None = RULES.get(func.overloadpacket)
        out = (rule or func)(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_meta]
        for tensor in tensors:
            self._add(tensor)
        self._count(func, args, kwargs or {}, out, tensors)
        return out

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.trace.left = {kind: size for kind, size in self._live.items() if size}

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        kind = self.classify(tensor)
        self._known[key] = (kind, size)
        weakref.finalize(storage, self._drop, key)
        self._live[kind] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.trace.at_peak = self._total, {kind: n for kind, n in self._live.items() if n}

    def _drop(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self._live[kind] -= size
        self._total -= size

    def _count(self, func, args, kwargs, out, tensors: list[Tensor]) -> None:
        if func.is_view or func.overloadpacket in NO_WORK:
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        packet = IN_PLACE.get(func.overloadpacket, func.overloadpacket)
        if packet is torch.ops.diffdpo_plan.attention_work:
            q, k, matrices = args
            flops, moved = matrices * 2 * q.numel() * k.shape[-2], 2 * _bytes(q) + 2 * _bytes(k)
        elif packet is aten._grouped_mm:  # each row by the one matrix of its group, or two stacks by groups of rows
            flops, moved = 2 * args[0].numel() * args[1].shape[-1], sum(map(_bytes, (*inputs, *tensors)))
        else:
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
            moved = sum(map(_bytes, inputs)) + sum(map(_bytes, tensors))
        half = bool(inputs) and inputs[0].element_size() == 2
        if moved or flops:
            self.trace.work[Work(flops, moved, half)] += 1


def _bytes(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()


def _bincount(values, weights=None, minlength=0):
    return values.new_empty(minlength, dtype=torch.long)


def _segment_reduce(data, reduce, *, lengths, **_):
    return data.new_empty(lengths.shape)


def _grouped_mm(rows, matrices, offs, *_, **__):
    """Rows times a matrix for each group, or two stacks of rows, group by group; torch's knows 16 bits alone."""
    if matrices.ndim == 3:
        return rows.new_empty(rows.shape[0], matrices.shape[-1])
    return rows.new_empty(len(offs), rows.shape[0], matrices.shape[-1])


def _some_number(tensor):
    return 1.0 if tensor.is_meta else aten._local_scalar_dense(tensor)


aten = torch.ops.aten
RULES: dict[
    Any, Callable[..., Any]
] = {  # shapes that depend on data, which meta tensors have not, or are refused there
    aten.bincount: _bincount,
    aten._local_scalar_dense: _some_number,
    aten.segment_reduce: _segment_reduce,
    aten._grouped_mm: _grouped_mm,
    aten._segment_reduce_backward: lambda grad, out, data, *_, **__: torch.empty_like(data),
}
IN_PLACE = {aten.addmm_: aten.addmm}  # torch knows the work of the latter
NO_WORK = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided, aten.detach}
