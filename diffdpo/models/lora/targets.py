"""Which modules LoRA adapts, and which are trained whole: names or an expression, held against a model.

The model may be an empty one, so that a mistake is met before the weights are read. No peft here, which takes seconds
to import.
"""

import re

from torch import nn

from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.spec import FamilySpec


def target_pattern(model: nn.Module, spec: FamilySpec, target_modules: str | None) -> str:
    """The regular expression of full module names that LoRA adapts.

    `target_modules`: None or "all-linear" for the family's default, module names of a block with commas
    ("q_proj,v_proj"), or a regular expression. Names mean modules inside blocks, so LLaDA's "ff_out" is never the
    head; a name that no block has is an error, where peft would adapt the others and say nothing. UserError, too, for
    an expression that matches nothing, the head or what is not linear.
    """
    if target_modules in (None, "all-linear"):
        return spec.lora_targets
    if not re.fullmatch(r"\s*[A-Za-z_]\w*(\s*,\s*[A-Za-z_]\w*)*\s*", target_modules):
        _check_expression(model, target_modules)
        return target_modules
    base = native(model)
    names = [name.strip() for name in target_modules.split(",")]
    there = {name.rpartition(".")[2] for name, module in base.blocks.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in names if name not in there]
    if unknown:
        listed = ", ".join(sorted(there))
        raise UserError(f"LoRA target {unknown[0]!r} is no linear module of a block; {spec.name} has {listed}")
    prefix = next(name for name, module in base.named_modules() if module is base.blocks)
    return rf"(.*\.)?{re.escape(prefix.rpartition('.')[2])}\.\d+\.(.*\.)?({'|'.join(names)})"


def whole_modules(model: nn.Module, adapted: str, names: str | None) -> list[str] | None:
    """Full names of the modules with weights of their own that `names` (last parts, or full names, with commas) mean.

    Those that the expression `adapted` chooses are LoRA's and none of them, so LLaDA's "ff_out" is the head here.
    UserError for a name that no other module has, and for weights that are two modules' in one.
    """
    if names is None:
        return None
    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    free = [name for name in owners if not re.fullmatch(adapted, name)]
    chosen = []
    for wanted in (part.strip() for part in names.split(",")):
        found = [name for name in free if wanted in (name, name.rpartition(".")[2])]
        if not found:
            listed = ", ".join(sorted({name.rpartition(".")[2] for name in free}))
            raise UserError(
                f"--lora_modules_to_save {wanted!r} is no module that can be trained whole; there is {listed}"
            )
        chosen += found
    base = native(model)
    if getattr(base.config, "tie_word_embeddings", False) and {base.embed, base.head} & {owners[n] for n in chosen}:
        raise UserError(
            "--lora_modules_to_save: this model's embedding is its head as well, and cannot be trained whole"
        )
    return chosen


def _check_expression(model: nn.Module, pattern: str) -> None:
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise UserError(f"LoRA target {pattern!r} is no regular expression: {error}") from error
    modules = dict(model.named_modules())
    matched = [name for name in modules if matcher.fullmatch(name)]
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not set(matched) & set(linear):
        raise UserError(
            f"LoRA target {pattern!r} matches no linear module; full names look like {', '.join(linear[:3])}"
        )
    for name in matched:
        module = modules[name]
        if module is native(model).head:
            raise UserError(f"LoRA target {pattern!r} matches the LM head; exclude it (adapt blocks only)")
        if name not in linear:
            found = f"{name or 'the model'} ({type(module).__name__})"
            raise UserError(f"LoRA target {pattern!r} matches {found}; only linear modules can be adapted")
