"""From a config.json to the module a run would train, on the meta device: every parameter's shape and no weight."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from diffdpo.config import TrainConfig
from diffdpo.engine.optimizer import state_bytes
from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.published_config import block_size_of
from diffdpo.models.architecture.router import train_routers, whole_with_routers
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.architecture.work import ModelWork
from diffdpo.models.load import FAMILIES, Family, made_config, read_config
from diffdpo.models.lora.adapters import add_lora
from diffdpo.planner.kernels import Nf4Linear
from diffdpo.scores.masked_log_probs import MaskedLogProbs


@dataclass(frozen=True)
class Numbers:
    """Counts of parameters (elements) and bytes of a module as held before an engine wraps it."""

    total: int  # of the unquantised model with its adapter
    trained: int
    largest_trained: int
    adapter: int
    trained_bytes: int
    frozen_bytes: int
    vocabulary: int
    layers: int
    hidden: int  # size of what passes from layer to layer
    largest_module: int  # elements of the module with the most parameters of its own
    state_bytes: int  # of the optimizer on whole weights
    largest_unit: int  # of what FSDP2 gathers at a time: a block, the embedding, the head
    layer: int  # elements of the largest block
    layer_met: int  # of them, those that a token is multiplied with, of all blocks' mean
    layer_attention: int  # width of attention


def read_shape(name_or_path: str, *, block_size: int | None = None) -> tuple[Family, PreTrainedConfig]:
    """Family and checked config of a config.json, a folder with one, or a hub id. UserError when there is none."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {path} has no config.json; give a checkpoint folder or a config.json"
            )
        return read_config(name_or_path, block_size=block_size)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--model_name_or_path {path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--model_name_or_path {path} is not JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"--model_name_or_path {path} has model_type {kind!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind], made_config(FAMILIES[kind], raw, str(path), block_size=block_size)


def weight_elements(family: Family, shape: PreTrainedConfig) -> int:
    """Parameters of the published model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in family.model_class(shape).parameters())


def skeleton(
    family: Family, shape: PreTrainedConfig, config: TrainConfig, *, bf16: bool, cast: bool, cuda: bool = True
) -> MaskedLogProbs:
    """What preference training hands its engine, on the meta device. ``cast``: the engine casts everything to bf16,
    the adapter too (DeepSpeed does). ``cuda``: on a GPU, so that ``--activation_offload`` moves something."""
    offload = cuda and config.activation_offload == "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device("meta"):
        model: Any = family.model_class(shape).to(dtype)  # type: ignore[arg-type]
    # a shifted family's positions are checked against their values, which meta tensors have not; shapes are the same
    blocks = block_size_of(shape)
    spec = FamilySpec(shape.model_type, 0, 1, 1, "", family.lora_targets, logit_shift=0, block_size=blocks)
    if config.load_in_4bit:
        quantise(model)
    if config.adapter_name_or_path:
        model = with_adapter(model, config.adapter_name_or_path)
    elif config.use_peft:
        whole = config.lora_modules_to_save
        with torch.device("meta"):
            model = add_lora(
                model,
                spec,
                r=config.lora_r,
                alpha=config.lora_alpha,
                target_modules=config.lora_target_modules,
                modules_to_save=whole_with_routers(model, whole) if config.train_router else whole,
                use_dora=config.use_dora,
            )
    else:
        if config.train_router:
            train_routers(model)
        model.requires_grad_(True)
    module = MaskedLogProbs(model, spec, layer_checkpointing=config.gradient_checkpointing, offload=offload)
    return module.to(torch.bfloat16) if cast else module  # packed 4-bit weights are integers and stay


def with_adapter(model: Any, folder: str) -> Any:
    """The shapes of an adapter that training goes on with. (The frozen copy of it that the reference takes is as large,
    without moments: a tenth of a percent of a model, which is not counted.)"""
    from peft import PeftConfig, get_peft_model

    shape = PeftConfig.from_pretrained(folder)
    shape.lora_dropout, shape.inference_mode = 0.0, False
    with torch.device("meta"):
        return get_peft_model(model, shape)


def quantise(model: nn.Module) -> None:
    """The blocks' linear layers in NF4, as `diffdpo.models.checkpoint.nf4` asks for."""
    for parent in list(native(model).blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Nf4Linear(child))


def count(module: MaskedLogProbs, *, optim: str = "adamw_torch") -> Numbers:
    """What is in a skeleton; ``optim``: whose state is counted."""
    base = native(module.model)
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    packed = [m for m in module.modules() if isinstance(m, Nf4Linear)]
    elements = sum(p.numel() for p in (*trained, *frozen))
    elements += sum(m.unpacked.numel() - m.weight.numel() - m.absmax.numel() - m.nested.numel() for m in packed)
    work, head = ModelWork.of(module.model), base.head.in_features * base.head.out_features
    units = (*base.blocks, base.embed, base.final_norm, base.head)
    outside = {p for m in (base.embed, base.head) for p in m.parameters()}
    return Numbers(
        total=elements,
        trained=sum(p.numel() for p in trained),
        largest_trained=max((p.numel() for p in trained), default=0),
        adapter=sum(p.numel() for name, p in module.named_parameters() if ".lora_" in name),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        vocabulary=base.head.weight.shape[0],
        layers=len(base.blocks),
        hidden=base.embed.weight.shape[1],
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()),
        state_bytes=sum(state_bytes(optim, p.shape, in_block=p not in outside) for p in trained),
        largest_unit=max(sum(p.numel() for p in unit.parameters()) for unit in units),
        layer=max(sum(p.numel() for p in block.parameters()) for block in base.blocks),
        layer_met=round(work.every + work.scored - head) // len(base.blocks),
        layer_attention=work.attention // len(base.blocks),
    )
