"""The model of a run: loaded, adapted, wrapped for scoring; and written at the end."""

from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.hub import split_revision
from diffdpo.config import RunConfig, TrainConfig
from diffdpo.engine.base import Engine
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import load_device, weight_shards
from diffdpo.engine.world import World
from diffdpo.models.architecture.router import train_routers, whole_with_routers
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import is_adapter, note_base, uses_dora
from diffdpo.models.checkpoint.model_folder import write_model
from diffdpo.models.load import LoadedModel, dtype_name, load_model


def load_policy(config: RunConfig, choice: EngineChoice, world: World, *, with_start: bool = False) -> LoadedModel:
    """The model to be trained: all of its weights, or an adapter on it, new or gone on with. ``with_start``: that
    adapter as it starts is kept beside it, as the reference."""
    adapter, lora = config.adapter_name_or_path, config if isinstance(config, TrainConfig) else None
    dora = uses_dora(adapter) if adapter else lora is not None and lora.use_dora
    loaded = load_model(
        model_or_bundled(config.policy),
        dtype=dtype_name(choice.reads_bf16(trained=not config.adapts)),
        device=load_device(choice, world),
        load_in_4bit=lora is not None and lora.load_in_4bit,
        block_size=config.block_size,
        # DoRA starts from norms of whole weights; and on a mesh of copies peft takes a shard's size for the weight's
        shards=None if dora or (config.adapts and choice.has_copies) else weight_shards(choice, world),
    )
    return adapted(loaded, config, with_start=with_start)


def adapted(loaded: LoadedModel, config: RunConfig, *, with_start: bool = False) -> LoadedModel:
    """The base with what is trained of it: every weight, or the adapter that the settings ask for."""
    adapter, lora = config.adapter_name_or_path, config if isinstance(config, TrainConfig) else None
    if not config.adapts:
        if config.train_router:
            train_routers(loaded.model)
        return replace(loaded, model=loaded.model.requires_grad_(True))
    from diffdpo.models.lora.adapters import add_lora, attach_adapter  # peft takes seconds to import

    if adapter:
        from diffdpo.models.lora.start import keep_start

        model = attach_adapter(loaded.model, adapter, trained=True)
        name, revision = split_revision(model_or_bundled(config.policy))
        model.peft_config["default"].base_model_name_or_path, model.peft_config["default"].revision = name, revision
        return replace(loaded, model=keep_start(model) if with_start else model)
    assert lora is not None
    whole = lora.lora_modules_to_save
    torch.manual_seed(lora.seed)  # the adapter starts the same on every rank
    model = add_lora(
        loaded.model,
        loaded.spec,
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        target_modules=lora.lora_target_modules,
        modules_to_save=whole_with_routers(loaded.model, whole) if lora.train_router else whole,
        revision=lora.model_revision,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    return replace(loaded, model=model)


def describe_model(config: RunConfig) -> str:
    """The model's name for the user."""
    base = config.policy or "the bundled arithmetic model"
    return f"adapter {config.adapter_name_or_path} on {base}" if config.adapter_name_or_path else base


def reading_of(config: RunConfig) -> str:
    """What the user is told before silent minutes."""
    then = "; its layers are compiled in the first step, which takes minutes" if config.torch_compile else ""
    return f"model      reading {describe_model(config)}{then}"


def save_final(folder: Path, engine: Engine, loaded: LoadedModel, *, block_size: int | None = None) -> None:
    """Weights (or adapter) and tokenizer in the published layout. Every rank calls; rank 0 writes. ``block_size``: as
    it was asked for, which an adapter's base may not say."""
    weights = engine.full_state_dict()
    if weights is None:
        return
    prefix = "model."  # of the scoring module that the engine holds
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    write_model(loaded.model, loaded.tokenizer, folder, state_dict=state)
    if is_adapter(folder):
        note_base(folder, block_size=block_size)
