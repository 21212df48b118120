"""NF4 weights through bitsandbytes: what is quantised, and what is not.

Only the blocks' linear layers: the embedding, the norms and the head keep their dtype. The head is named by its full
path, because in LLaDA every block has an `ff_out` too.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from diffdpo.errors import UserError


def nf4_config(dtype: torch.dtype, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> BitsAndBytesConfig:
    """NF4 with double quantisation, computing in `dtype` (QLoRA, 2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: pip install 'diffdpo[gpu]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[head_name(model_class, config)],
    )


def head_name(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Full module path of the LM head, from an empty model."""
    with torch.device("meta"):
        model = model_class(config)
    return next(name for name, module in model.named_modules() if module is model.head)


def keep_training_kernels(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking CPU weights in place at their first forward without gradient.

    Its packed CPU kernel (processors with AVX512-BF16) cannot be differentiated and rounds differently, so the
    reference and the policy would no longer be the same numbers; it also needs layer sizes divisible by 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
