"""The model of a run: loaded, adapted, wrapped for scoring; and written at the end."""

from dataclasses import replace
from pathlib import Path

import torch

from diffdpo.config import RunConfig, TrainConfig
from diffdpo.engine.base import Engine
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import load_device, weight_shards
from diffdpo.engine.world import World
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import is_adapter, note_base
from diffdpo.models.checkpoint.model_folder import write_model
from diffdpo.models.load import LoadedModel, dtype_name, load_model


def load_policy(config: TrainConfig, choice: EngineChoice, world: World) -> LoadedModel:
    """The model to be trained: all of its weights, or an adapter on it."""
    loaded = load_model(
        model_or_bundled(config.policy),
        dtype=dtype_name(choice.reads_bf16(trained=not config.use_peft)),
        device=load_device(choice, world),
        load_in_4bit=config.load_in_4bit,
        block_size=config.block_size,
        # DoRA starts from norms of whole weights; and on a mesh of copies peft takes a shard's size for the weight's
        shards=None if config.use_dora or (config.use_peft and choice.has_copies) else weight_shards(choice, world),
    )
    if not config.use_peft:
        return replace(loaded, model=loaded.model.requires_grad_(True))
    from diffdpo.models.lora.adapters import add_lora  # peft takes seconds to import

    torch.manual_seed(config.seed)  # the adapter starts the same on every rank
    model = add_lora(
        loaded.model,
        loaded.spec,
        r=config.lora_r,
        alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        modules_to_save=config.lora_modules_to_save,
        revision=config.model_revision,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    return replace(loaded, model=model)


def describe_model(config: RunConfig) -> str:
    """For the user."""
    return config.policy or "the bundled arithmetic model"


def reading_of(config: RunConfig) -> str:
    """For the user, before silent minutes."""
    then = "; its layers are compiled in the first step, which takes minutes" if config.torch_compile else ""
    return f"model      reading {describe_model(config)}{then}"


def save_final(folder: Path, engine: Engine, loaded: LoadedModel) -> None:
    """Weights (or adapter) and tokenizer in the published layout. Every rank calls; rank 0 writes."""
    weights = engine.full_state_dict()
    if weights is None:
        return
    prefix = "model."  # of the scoring module that the engine holds
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    write_model(loaded.model, loaded.tokenizer, folder, state_dict=state)
    if is_adapter(folder):
        note_base(folder)
