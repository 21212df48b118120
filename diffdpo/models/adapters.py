"""LoRA adapters through peft: where they go by default, the reference model inside them, and merging.

The reference is the model with its adapters switched off, so no second copy of the weights exists. Saved adapters are
peft's own format with the published module names: plain peft loads them onto the published model.
"""

import re
from contextlib import AbstractContextManager

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from diffdpo.errors import UserError
from diffdpo.models.backbone import native
from diffdpo.models.spec import FamilySpec


def add_lora(
    model: nn.Module,
    spec: FamilySpec,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """Freeze `model` and adapt the linear modules whose full names match `target_modules` (default: the family's).

    Adapters train in fp32 whatever the weights' dtype. Raises UserError when the expression is invalid, matches
    nothing, or matches the head.
    """
    pattern = target_modules or spec.lora_targets
    adapted_modules(model, pattern)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        use_dora=use_dora,
        use_rslora=use_rslora,
        bias="none",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def adapted_modules(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules LoRA would adapt; UserError when there are none or the head is among them."""
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise UserError(f"LoRA target {pattern!r} is no regular expression: {error}") from error
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [(name, module) for name, module in linear if matcher.fullmatch(name)]
    if not matched:
        examples = ", ".join(name for name, _ in linear[:3])
        raise UserError(f"LoRA target {pattern!r} matches no linear module; full names look like {examples}")
    head = native(model).head
    if any(module is head for _, module in matched):
        raise UserError(f"LoRA target {pattern!r} matches the LM head; exclude it (adapt blocks only)")
    return [name for name, _ in matched]


def reference(model: PeftModel) -> AbstractContextManager:
    """Inside this context the model is its own reference: adapters off."""
    return model.disable_adapter()


def merge(model: PeftModel) -> nn.Module:
    """Full weights with the adapters added in, as a plain native model. 4-bit weights are refused: their sum with an
    adapter would be quantised again; load the base in bf16 and merge there."""
    if getattr(native(model), "is_loaded_in_4bit", False):
        raise UserError("cannot merge into 4-bit weights: load the base model without load_in_4bit, then merge")
    return model.merge_and_unload()
