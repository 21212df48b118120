"""``--reference``: which of the modes is used, and why; and the modes that keep a model.

``none`` for losses that read no reference, ``adapter_off`` with a new adapter, ``adapter_start`` with one that training
goes on with, else ``copy`` where a second model is small
beside the memory and ``precomputed`` (see ``precompute.py``) where it is not.
"""

import os
from collections.abc import Callable
from functools import partial

import psutil
from torch import nn

from diffdpo.config import TrainConfig
from diffdpo.engine.base import Engine, FrozenModule
from diffdpo.engine.choice import PLAIN, EngineChoice, engine_kind
from diffdpo.engine.make import weight_shards
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu, kind_of
from diffdpo.losses.options import LossOptions
from diffdpo.losses.preference import LOSSES
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter, is_adapter
from diffdpo.models.checkpoint.weights import checkpoint_folder, shard_files
from diffdpo.models.load import dtype_name, load_with_adapter
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import (
    Reference,
    adapter_off_reference,
    frozen_copy,
    frozen_reference,
    no_reference,
    switched_reference,
)
from diffdpo.scores.segments import Segments

AFFORDABLE = 0.1  # of a process's memory: up to there ``auto`` keeps a second model


def check_reference(config: TrainConfig, loss: LossOptions) -> None:
    """UserError for a ``--reference`` that cannot serve the loss; before anything is opened."""
    if config.sync_ref_model and loss.reference_free:
        raise UserError(f"--sync_ref_model: --loss_type {loss.describe()} reads no reference; leave it out")
    if config.sync_ref_model and engine_kind(config) != PLAIN:
        raise UserError(
            "--sync_ref_model works with the plain engine only: the others keep a frozen reference in shards, or out "
            "of their checkpoints; leave --ds_config and --engine out, or use rounds (launch/iterate.py)"
        )
    if config.sync_ref_model and config.adapts and config.ref_model_mixup_alpha < 1:
        raise UserError(
            "--sync_ref_model: the mean of two adapters' factors is not the mean of what they add to the weights; give "
            "--ref_model_mixup_alpha 1, or train all weights"
        )
    if config.reference == "none" and config.f_divergence_type != "reverse_kl":
        raise UserError(
            f"--f_divergence_type {config.f_divergence_type} is of the ratio to a reference, and --reference none has "
            "none; leave one out"
        )
    unserved = _not_precomputable(loss)
    if config.reference == "precomputed" and unserved:
        raise UserError(f"--reference precomputed: {unserved}; use --reference copy, adapter_off or adapter_start")


def choose_mode(config: TrainConfig, loss: LossOptions, *, share: Callable[[], float]) -> tuple[str, str]:
    """(mode, why). ``share()`` says which part of a process's memory a second model would take."""
    if config.reference == "none" and not loss.reference_free:
        return "none", "as asked for: the loss is taken as if the reference gave every answer the same score"
    if config.reference != "auto":
        return config.reference, "as asked for"
    if loss.reference_free:
        return "none", "the loss does not read it"
    if config.sync_ref_model:
        return "copy", "it follows the policy"
    unserved = _not_precomputable(loss)
    if config.reference_cache and not unserved:
        return "precomputed", "--reference_cache is given"
    if config.adapter_name_or_path and not config.ref_model_name_or_path:
        return "adapter_start", "the adapter as it starts, frozen beside the one that is trained"
    if config.adapts and not config.ref_model_name_or_path:
        return "adapter_off", "the policy without its adapter is the reference"
    if unserved:
        return "copy", unserved
    part = share()
    if part <= AFFORDABLE:
        return "copy", f"a second model takes {part:.1%} of the memory"
    return "precomputed", f"a second model would take {part:.0%} of the memory"


def _not_precomputable(loss: LossOptions) -> str:
    """Why scores cannot be made beforehand; '' when they can."""
    coupled = [name for name in loss.names if LOSSES[name].needs_reference_point]
    return f"{coupled[0]} needs reference scores of mismatched answers, which depend on the batch" if coupled else ""


def second_model_share(config: TrainConfig, choice: EngineChoice, world: World) -> float:
    """Bytes of the reference's weight files over the memory this process computes in; ZeRO-3 shares a copy out."""
    name = config.ref_model_name_or_path or model_or_bundled(config.policy)
    folder = checkpoint_folder(base_of_adapter(name) if is_adapter(name) else name)
    size = sum(path.stat().st_size for path in shard_files(folder))
    if is_gpu(world.device):
        memory = kind_of(world.device).total_memory(world.device)
    else:
        memory = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return share_of_memory(choice, size, memory=memory)


def share_of_memory(choice: EngineChoice, size: int, *, memory: int) -> float:
    """A second model's ``size`` in bytes over the ``memory`` of each process; sharded parameters share it out."""
    return size / memory / (choice.processes if choice.shards_parameters else 1)


def load_reference(config: TrainConfig, choice: EngineChoice, world: World, *, mask_token_id: int) -> MaskedLogProbs:
    """``--ref_model_name_or_path``, or the policy as it is before training: on the CPU, or in shards where the engine
    has weights read so."""
    named = config.ref_model_name_or_path
    loaded = load_with_adapter(
        named or config.policy,
        None if named else config.adapter_name_or_path,
        dtype=dtype_name(choice.bf16),
        load_in_4bit=config.load_in_4bit and not named,
        block_size=config.block_size,
        shards=weight_shards(choice, world),
    )
    if loaded.spec.mask_token_id != mask_token_id:
        raise UserError(
            f"--ref_model_name_or_path has mask token {loaded.spec.mask_token_id}, the policy {mask_token_id}; policy "
            "and reference must share a vocabulary"
        )
    return MaskedLogProbs.of(loaded.model, loaded.spec, config).requires_grad_(False)


def make_frozen(config: TrainConfig, module: MaskedLogProbs, choice: EngineChoice, world: World) -> nn.Module:
    """The second model of mode ``copy``, to be made before an engine wraps ``module``. Shards cannot be copied, so they
    are read again."""
    if config.ref_model_name_or_path or weight_shards(choice, world) is not None:
        return load_reference(config, choice, world, mask_token_id=module.spec.mask_token_id)
    return frozen_copy(module)


def make_reference(
    config: TrainConfig, mode: str, engine: Engine, frozen: FrozenModule | None
) -> tuple[Callable[[Segments], Reference], str]:
    """(the reference for a way to cut rows, what it is) of the modes that look nothing up. ``frozen``: what
    ``make_frozen`` gave, held by the engine."""
    if mode == "none":
        return lambda segments: no_reference, "none"
    if mode == "adapter_off":
        policy = engine.module.model
        assert isinstance(policy, nn.Module)
        return partial(adapter_off_reference, engine, policy), "the policy with its adapter off"
    if mode == "adapter_start":
        from diffdpo.models.lora.start import at_start  # peft takes seconds to import

        return partial(switched_reference, engine, partial(at_start, engine.module)), "the adapter as it started"
    assert frozen is not None
    what = config.ref_model_name_or_path or "the policy as it starts"
    return partial(frozen_reference, frozen), f"frozen copy of {what}"
