"""LoRA adapters through peft: where they go by default, the reference model inside them, and merging.

The reference is the model with its adapters switched off, so no second copy of the weights exists. Saved adapters are
peft's own format with the published module names: plain peft loads them onto the published model.
"""

import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.layers import VocabularyHead
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffdpo.models.lora.targets import target_pattern, whole_modules
from diffdpo.optional import fault_of


def add_lora(
    model: nn.Module,
    spec: FamilySpec,
    *,
    r: int = 16,
    alpha: float = 32,
    target_modules: str | None = None,
    modules_to_save: str | None = None,
    revision: str | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """Freeze `model` and adapt the linear modules `target_modules` chooses (see `target_pattern`); `modules_to_save`
    are trained whole, by name (see `whole_modules`). `revision`: of the hub, for whoever loads the adapter.

    Adapters train in fp32 whatever the weights' dtype; no dropout, because policy and reference must be the same
    numbers where their weights are. Raises UserError for a rank or scale that is not above 0, and for targets that
    match nothing, the head or what is not linear.
    """
    check_lora(r, alpha)
    if hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already: go on with it (--adapter_name_or_path), or merge it first")
    adapted = target_pattern(model, spec, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides by it; any number does
        lora_dropout=0.0,
        target_modules=adapted,
        modules_to_save=whole_modules(model, adapted, modules_to_save),
        revision=revision,
        use_dora=use_dora,
        use_rslora=use_rslora,
        bias="none",
    )
    fault_of("bitsandbytes")  # peft would import one that is broken for weights that are not in 4 bits
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def check_lora(r: int, alpha: float) -> None:
    """UserError for a rank below 1 or a scale that is not above 0."""
    if r < 1:
        raise UserError(f"--lora_r is {r}; it must be at least 1")
    if alpha <= 0:
        raise UserError(f"--lora_alpha is {alpha}; it must be above 0 (the adapter is scaled by lora_alpha / lora_r)")


def attach_adapter(model: nn.Module, folder: str | Path, *, trained: bool = False) -> PeftModel:
    """`model` with the adapter that peft saved in `folder`, in eval mode; `trained`: to go on with it, in fp32.

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
            config = PeftConfig.from_pretrained(str(folder))
            config.lora_dropout, config.inference_mode = 0.0, not trained  # dropout is off in every model here
            fault_of("bitsandbytes")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trained, config=config).eval()
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
    """Full weights with the adapters added in, as a plain native model.

    UserError for 4-bit weights, whose sum with an adapter would be quantised again (load the base in bf16 and merge
    there), and for an adapter (of plain peft) on an embedding that is the head as well: merged, both would change.
    """
    base = native(model)
    if getattr(base, "is_loaded_in_4bit", False):
        raise UserError("cannot merge into 4-bit weights: load the base model without load_in_4bit, then merge")
    if base.config.tie_word_embeddings and {type(base.embed), type(base.head)} != {nn.Embedding, VocabularyHead}:
        raise UserError("cannot merge an adapter on the embedding or the head where they are one matrix: adapt blocks")
    return cast(PeftModel, model).merge_and_unload()
