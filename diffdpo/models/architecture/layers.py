"""What every family here is made of: RMS norm, rotary positions, the vocabulary head. No family knows the others.

Shapes: N tokens in the stream, M scored tokens, H heads, D head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.token_log_probs import liger_log_probs, token_and_best_log_probs, token_log_probs


class RMSNorm(nn.Module):
    """x / rms(x) in fp32 (or wider), cast back, then times the weight: the order of the published models."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if is_gpu(x.device):  # the fused kernel accumulates in fp32 and casts before the weight as well
            return self.weight * F.rms_norm(x, (x.shape[-1],), None, self.eps)
        return self.weight * _UnitRMS.apply(x, self.eps)


class _UnitRMS(torch.autograd.Function):
    """x / rms(x). By hand because torch's CPU `rms_norm` was ten times slower than these few operations."""

    @staticmethod
    def forward(ctx, x, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = (wide * scale).to(x.dtype)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    def backward(ctx, grad):
        unit, scale = ctx.saved_tensors
        projection = torch.linalg.vecdot(grad.to(scale.dtype), unit.to(scale.dtype)).unsqueeze(-1).div_(unit.shape[-1])
        return ((grad - unit * projection) * scale).to(grad.dtype), None


class RotaryTable:
    """cos and sin of RoPE in fp32 (fp64 in an fp64 model), cached for the longest row seen. Holds no buffer: nothing
    of it is saved, moved or sharded with the model."""

    def __init__(self, head_size: int, theta: float):
        self.head_size, self.theta = head_size, theta
        self._cache: dict[tuple, Tensor] = {}

    def frequencies(self, dtype: torch.dtype) -> Tensor:
        exponent = torch.arange(0, self.head_size, 2, dtype=dtype) / self.head_size
        return 1.0 / self.theta**exponent

    def __call__(self, positions_N: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, D/2] at `positions_N`, all below `length`, for activations of `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        key = (positions_N.device, wide)
        table = self._cache.get(key)
        if table is None or table.shape[1] < length:
            size = max(length, 2 * (0 if table is None else table.shape[1]))
            angle_TD = torch.outer(torch.arange(size, dtype=wide), self.frequencies(wide))
            table = self._cache[key] = torch.stack((angle_TD.cos(), angle_TD.sin())).to(positions_N.device)
        cos_ND, sin_ND = table[:, positions_N]
        return cos_ND.unsqueeze(1), sin_ND.unsqueeze(1)


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor, *, full_precision: bool = True) -> Tensor:
    """Rotary embedding, half-rotation layout: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    `full_precision` rotates in the tables' dtype and casts back (LLaDA); otherwise the tables are cast (Qwen, Llama).
    """
    if full_precision:
        return _Rotate.apply(x_NHD.to(cos.dtype), cos, sin).to(x_NHD.dtype)
    return _Rotate.apply(x_NHD, cos.to(x_NHD.dtype), sin.to(x_NHD.dtype))


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the inverse rotation: nothing but the shared tables is kept for the backward."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # fuses this itself; writing into views breaks its graph and its bookkeeping
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    out = torch.empty_like(x)
    out1, out2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out


class VocabularyHead(nn.Linear):
    """The LM head. `head(h)` gives logits; `head(h, target)` log-probabilities without the [M, V] matrix, and with
    `also_best` [M, 2], those of the likeliest tokens beside them.

    Both go through the module's call because engines that shard weights gather them only during such a call.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, scale: float = 1.0):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.scale = scale

    @classmethod
    def of(cls, linear: nn.Linear, *, scale: float = 1.0) -> "VocabularyHead":
        """A linear layer's weights as a head (transformers builds a plain Linear when it resizes the vocabulary)."""
        if isinstance(linear, cls):
            return linear
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, scale=scale)
        head.weight = linear.weight
        return head

    def forward(
        self,
        hidden: Tensor,
        target_M: Tensor | None = None,
        *,
        logits_budget: int | None = None,
        use_liger: bool = False,
        also_best: bool = False,
    ) -> Tensor:
        hidden = hidden if self.scale == 1.0 else hidden * self.scale
        if target_M is None:
            return super().forward(hidden)
        if also_best:
            return token_and_best_log_probs(hidden, self.weight, target_M, logits_budget=logits_budget)
        if use_liger and target_M.numel():
            return liger_log_probs(hidden, self.weight, target_M)
        return token_log_probs(hidden, self.weight, target_M, logits_budget=logits_budget)
