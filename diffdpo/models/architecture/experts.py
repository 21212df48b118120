"""A mixture of experts: which experts see a token, and Σ weight · expert(token).

Two ways with the same numbers. A loop runs expert after expert over the tokens that chose it: on the CPU, where weights
are gathered module by module (ZeRO-3), and where an adapter is of a kind that is not known here. Grouped products
(`torch._grouped_mm`) run all experts of a layer at once over tokens sorted by expert: on a GPU, where hundreds of small
products would cost more in launches than in work. Their weights are stacked for one product at a time, in the forward
and again in the backward, so that no second copy of a layer's experts is held between them; 4-bit weights are unpacked
in the same moment.

Shapes: N tokens, K hidden size, O output size, E experts, T experts of a token, X = N T pairs of token and expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffdpo.gpus import is_gpu

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_products(h_NK: Tensor) -> bool:
    """Whether grouped products are taken for tokens of this device and dtype."""
    return (is_gpu(h_NK.device) or h_NK.is_meta) and h_NK.dtype in GROUPED_DTYPES


def mix_experts(h_NK: Tensor, experts: nn.ModuleList, expert_NT: Tensor, weight_NT: Tensor) -> Tensor:
    """Σ_T weight · expert(h) [N, K]; every expert is a gated MLP of `gate_proj`, `up_proj` and `down_proj`."""
    if len(h_NK) and grouped_products(h_NK) and all(map(_stackable, experts.modules())):
        return _grouped(h_NK, experts, expert_NT, weight_NT)
    out_NK = torch.zeros_like(h_NK)
    if not len(h_NK):
        return out_NK + sum(expert(h_NK) for expert in experts if _must_run(expert)) + weight_NT.sum().to(h_NK.dtype)
    for number, expert in enumerate(experts):
        token_X, place_X = (expert_NT == number).nonzero(as_tuple=True)
        if not len(token_X) and not _must_run(expert):
            continue
        value_XK = expert(h_NK[token_X]) * weight_NT[token_X, place_X, None].to(h_NK.dtype)
        out_NK = out_NK.index_add(0, token_X, value_XK)
    return out_NK


def _must_run(expert: nn.Module) -> bool:
    """Also without tokens: a trained expert's gradient is then 0 and not absent; a sharded one is gathered by all."""
    return any(p.requires_grad or hasattr(p, "ds_id") for p in expert.parameters())


def _grouped(h_NK: Tensor, experts: nn.ModuleList, expert_NT: Tensor, weight_NT: Tensor) -> Tensor:
    expert_X = expert_NT.flatten()
    order_X = expert_X.argsort(stable=True)
    ends_E = torch.bincount(expert_X, minlength=len(experts)).cumsum(0).to(torch.int32)
    h_XK = h_NK[order_X // expert_NT.shape[1]]
    gate_XO = grouped_linear(h_XK, [expert.gate_proj for expert in experts], ends_E)  # type: ignore[misc]
    up_XO = grouped_linear(h_XK, [expert.up_proj for expert in experts], ends_E)  # type: ignore[misc]
    inner_XO = nn.functional.silu(gate_XO) * up_XO
    value_XK = grouped_linear(inner_XO, [expert.down_proj for expert in experts], ends_E)  # type: ignore[misc]
    back_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    value_NTK = value_XK[back_X].unflatten(0, expert_NT.shape)  # summed in a fixed order on every device
    return (value_NTK * weight_NT[..., None].to(h_NK.dtype)).sum(1)


def grouped_linear(x_XK: Tensor, layers: Sequence[nn.Module], ends_E: Tensor) -> Tensor:
    """[X, O]: rows up to `ends_E[e]` (and from the end before) through layer e, plain, in 4 bits, or with LoRA."""
    bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
    y_XO = _GroupedLinear.apply(x_XK, ends_E, bases, *(base.weight for base in bases))
    adapter = _adapter(layers[0])
    if adapter is None:
        return y_XO
    down: list[Any] = [layer.lora_A[adapter] for layer in layers]  # type: ignore[index]
    up: list[Any] = [layer.lora_B[adapter] for layer in layers]  # type: ignore[index]
    inner_XR = x_XK.to(down[0].weight.dtype)
    for half in (down, up):
        inner_XR = _GroupedLinear.apply(inner_XR, ends_E, half, *(layer.weight for layer in half))
    return y_XO + (layers[0].scaling[adapter] * inner_XR).to(y_XO.dtype)  # type: ignore[index]


def _adapter(layer: Any) -> str | None:
    """The LoRA that is at work in a layer; None where there is none."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    return next((name for name in layer.active_adapters if name in layer.lora_A), None)


def _stackable(module: nn.Module) -> bool:
    """Whether what this module is can be part of a grouped product: no shard of ZeRO-3, no adapter but one LoRA."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
        return False
    if getattr(module, "bias", None) is not None:
        return False
    if not hasattr(module, "lora_A"):
        return True
    layer: Any = module
    return len(layer.active_adapters) == 1 and not any(getattr(layer, "use_dora", {}).values())


def _stacked(layers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Their weights [E, O, K]."""
    return torch.stack([_whole(layer, dtype) for layer in layers])


def _whole(layer: Any, dtype: torch.dtype) -> Tensor:
    if hasattr(layer, "unpacked"):  # the planner's 4-bit layer
        return torch.empty_like(layer.unpacked, dtype=dtype)
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight, state).to(dtype)


class _GroupedLinear(torch.autograd.Function):
    """Keeps its input only where the weights are trained, and never the stacked weights."""

    @staticmethod
    def forward(ctx, x_XK, ends_E, layers, *weights):
        ctx.layers, ctx.trained = layers, any(weight.requires_grad for weight in weights)
        ctx.save_for_backward(ends_E, *((x_XK,) if ctx.trained else ()))
        return torch._grouped_mm(x_XK, _stacked(layers, x_XK.dtype).transpose(-1, -2), offs=ends_E)

    @staticmethod
    def backward(ctx, grad_XO):
        ends_E, *kept = ctx.saved_tensors
        grad_XO = grad_XO.contiguous()
        grad_XK = None
        if ctx.needs_input_grad[0]:
            grad_XK = torch._grouped_mm(grad_XO, _stacked(ctx.layers, grad_XO.dtype), offs=ends_E)
        if not ctx.trained:
            return grad_XK, None, None, *(None for _ in ctx.layers)
        grad_EOK = torch._grouped_mm(grad_XO.T, kept[0], offs=ends_E)
        return grad_XK, None, None, *grad_EOK.unbind()
