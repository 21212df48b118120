"""LoRA adapters through peft: where they go by default, the reference model inside them, and merging.

The reference is the model with its adapters switched off, so no second copy of the weights exists. Saved adapters are
peft's own format with the published module names: plain peft loads them onto the published model.
"""

import re
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from diffdpo.errors import UserError
from diffdpo.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffdpo.models.backbone import native
from diffdpo.models.spec import FamilySpec


def add_lora(
    model: nn.Module,
    spec: FamilySpec,
    *,
    r: int = 16,
    alpha: float = 32,
    target_modules: str | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """Freeze `model` and adapt the linear modules `target_modules` chooses (see `target_pattern`).

    Adapters train in fp32 whatever the weights' dtype; no dropout, because policy and reference must be the same
    numbers where their weights are. Raises UserError for a rank or scale that is not above 0, and for targets that
    match nothing or the head.
    """
    check_lora(r, alpha)
    if hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already: merge it into full weights first (launch/export.py)")
    pattern = target_pattern(model, spec, target_modules)
    adapted_modules(model, pattern)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides by it; any number does
        lora_dropout=0.0,
        target_modules=pattern,
        use_dora=use_dora,
        use_rslora=use_rslora,
        bias="none",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def check_lora(r: int, alpha: float) -> None:
    """UserError for a rank below 1 or a scale that is not above 0."""
    if r < 1:
        raise UserError(f"--lora_r is {r}; it must be at least 1")
    if alpha <= 0:
        raise UserError(f"--lora_alpha is {alpha}; it must be above 0 (the adapter is scaled by lora_alpha / lora_r)")


def target_pattern(model: nn.Module, spec: FamilySpec, target_modules: str | None) -> str:
    """The regular expression of full module names that LoRA adapts.

    `target_modules`: None or "all-linear" for the family's default, module names of a block with commas
    ("q_proj,v_proj"), or a regular expression. Names mean modules inside blocks, so LLaDA's "ff_out" is never the
    head; a name that no block has is an error, where peft would adapt the others and say nothing.
    """
    if target_modules in (None, "all-linear"):
        return spec.lora_targets
    if not re.fullmatch(r"\s*[A-Za-z_]\w*(\s*,\s*[A-Za-z_]\w*)*\s*", target_modules):
        return target_modules
    base = native(model)
    names = [name.strip() for name in target_modules.split(",")]
    there = {name.rpartition(".")[2] for name, module in base.blocks.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UserError(f"LoRA target {unknown[0]!r} is no linear module of a block; {spec.name} has {_listed(there)}")
    prefix = next(name for name, module in base.named_modules() if module is base.blocks)
    return rf"(.*\.)?{re.escape(prefix.rpartition('.')[2])}\.\d+\.(.*\.)?({'|'.join(names)})"


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


def attach_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """`model` with the adapter that peft saved in `folder`, in eval mode.

    UserError unless every tensor of the adapter finds its place and every place its tensor: peft would leave places
    at their random start and ignore tensors it cannot place.
    """
    file, base = Path(folder) / ADAPTER_WEIGHTS, native(model).name_or_path
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has {ADAPTER_CONFIG} but no {file.name}: the adapter's weights are missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            saved = set(tensors.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are an error below
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {str(folder)!r} does not fit {base!r}: {reason}") from error
    if not hasattr(native(adapted).head, "scale"):  # peft's wrapper knows nothing of scores
        raise UserError(f"adapter {str(folder)!r} changes the LM head; supported: the blocks. Merge it with peft first")
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, what in ((places - saved, "lacks"), (saved - places, "has no place for")):
        if names:
            raise UserError(f"adapter {str(folder)!r} {what} {len(names)} tensors, first {min(names)}")
    return adapted


def reference(model: PeftModel) -> AbstractContextManager:
    """Inside this context the model is its own reference: adapters off."""
    return model.disable_adapter()


def merge(model: nn.Module) -> nn.Module:
    """Full weights with the adapters added in, as a plain native model. 4-bit weights are refused: their sum with an
    adapter would be quantised again; load the base in bf16 and merge there."""
    if getattr(native(model), "is_loaded_in_4bit", False):
        raise UserError("cannot merge into 4-bit weights: load the base model without load_in_4bit, then merge")
    return cast(PeftModel, model).merge_and_unload()


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
