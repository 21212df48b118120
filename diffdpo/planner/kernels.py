"""Kernels without data: what a device's fused kernels keep for the backward, for tensors on the meta device.

A meta tensor has a shape and no data, so a forward over it costs microseconds and no memory, and everything but fused
kernels leaves the same tensors behind as the real run. The kernels that a device picks by itself are stated here: what
they save and return is part of their contract (torch's ``derivatives.yaml``), what they do inside is not.

Shapes: B rows, H heads, T tokens, D head size, N stream tokens, K hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdpo.models.architecture.layers import RMSNorm

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
"""Weights that share an absmax byte, and absmax bytes that share an fp32 scale (double quantisation)."""


@contextmanager
def device_kernels(*, cuda: bool) -> Iterator[None]:
    """Inside, the models' calls of fused kernels go to the stand-ins: those of a CPU, or with ``cuda`` of a GPU."""
    swaps: list[tuple[Any, str, Any]] = [(F, "scaled_dot_product_attention", _attention)]
    if cuda:
        swaps.append((RMSNorm, "forward", lambda norm, x: norm.weight * _FusedRmsNorm.apply(x)))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    try:
        for owner, name, stand_in in swaps:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, real in kept:
            setattr(owner, name, real)


def _attention(q, k, v, attn_mask=None, enable_gqa=False):  # masks are read, and kept by the layout
    return _FlashAttention.apply(q, k, v)


class _FlashAttention(torch.autograd.Function):
    """Attention that keeps q, k, v, its output and a log-sum-exp a row: flash kernels of the CPU and the GPU alike.

    Multiplying matrices of the right sizes is how the operations get counted; the product itself is never held.
    """

    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD):
        rows, heads, length, size = q_BHTD.shape
        out_BHTD = q_BHTD.new_empty(rows, length, heads, size).transpose(1, 2)
        lse_BHT = q_BHTD.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT)
        attention_work(q_BHTD, k_BGTD, matrices=2)
        return out_BHTD

    @staticmethod
    def backward(ctx, grad_BHTD):
        q, k, v, _, _ = ctx.saved_tensors
        attention_work(q, k, matrices=5)
        return tuple(t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))


@torch.library.custom_op("diffdpo_plan::attention_work", mutates_args=())
def attention_work(q: Tensor, k: Tensor, matrices: int) -> Tensor:
    """A mark in the stream of operations: ``matrices`` products of [T, D] by [D, T] for every head."""
    raise NotImplementedError("only on the meta device")


@attention_work.register_fake
def _(q: Tensor, k: Tensor, matrices: int) -> Tensor:
    return q.new_empty(0)


class _FusedRmsNorm(torch.autograd.Function):
    """torch's CUDA ``_fused_rms_norm``: keeps its input and 1/rms."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        return x * grad


class Nf4Linear(nn.Linear):
    """A linear layer in NF4 with double quantisation as bitsandbytes holds it: the forward and the backward each unpack
    the whole weight for a moment, and the input is not kept. Its output is cloned, as peft's 4-bit layer does."""

    def __init__(self, linear: nn.Linear):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        count = linear.weight.numel()
        self.unpacked = torch.empty_like(linear.weight, device="meta").detach()
        blocks = -(-count // NF4_BLOCK)
        self.weight = _frozen(torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta"))
        self.absmax = _frozen(torch.empty(blocks, dtype=torch.uint8, device="meta"))
        scales = 4 * -(-blocks // NF4_NESTED_BLOCK)  # fp32, held as bytes: casting the module must leave them alone
        self.nested = _frozen(torch.empty(scales, dtype=torch.uint8, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        out = _Nf4Product.apply(x, self.weight, self.unpacked.shape, self.bias)
        return out.clone()


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, shape, bias):
        ctx.shape, ctx.dtype = shape, x.dtype
        out = x @ torch.zeros(shape, dtype=x.dtype, device=packed.device).T
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device), None, None, None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
