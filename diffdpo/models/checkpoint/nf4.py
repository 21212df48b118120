"""NF4 weights through bitsandbytes: what is quantised, and what is not.

Only the blocks' linear layers: the embedding, the norms and the head keep their dtype.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from diffdpo.errors import UserError
from diffdpo.optional import fault_of


def expect_nf4(model: Any, dtype: torch.dtype) -> None:
    """Put 4-bit linear layers into the `blocks` of an empty model: NF4, double quantisation, computing in `dtype`.

    QLoRA, 2305.14314. The weights are quantised as they arrive (`quantised`).
    """
    if fault := fault_of("bitsandbytes"):
        raise UserError(f"load_in_4bit: {fault}; pip install bitsandbytes (of this CUDA), or leave it out")
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
                layer = Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta")
                _keep_training_kernel(layer)
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # transformers' and peft's sign of it


def quantised(expected: nn.Parameter, weight: Tensor) -> nn.Parameter:
    """`weight` as the 4-bit parameter `expected` (of an empty model) asks for, on the device of `weight`."""
    return cast(nn.Parameter, type(expected)(weight, **expected.__dict__).to(weight.device))


def is_nf4(parameter: nn.Parameter) -> bool:
    """Whether this is a 4-bit parameter of bitsandbytes, filled or not."""
    return hasattr(parameter, "quant_state")


def _keep_training_kernel(layer: nn.Module) -> None:
    """Stop bitsandbytes from repacking CPU weights in place at their first forward without gradient.

    Its packed CPU kernel (processors with AVX512-BF16) cannot be differentiated and rounds differently, so the
    reference and the policy would no longer be the same numbers; it also needs layer sizes divisible by 64.
    """
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
