"""What a run would do, as far as its memory and time depend on it: settings resolved by the run's own rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffdpo import build
from diffdpo.config import TrainConfig
from diffdpo.engine.ds_config import read_ds_config
from diffdpo.engine.base import OptimizerOptions
from diffdpo.engine.deepspeed import DeepSpeedEngine, complete_ds_config, hands_gradients_over, zero_stage
from diffdpo.reference.modes import check_reference, choose_mode
from diffdpo.step.strategy import choose_strategy, micro_batch_shape


@dataclass(frozen=True)
class Zero:
    """A DeepSpeed configuration's memory settings, with DeepSpeed's defaults (0.19)."""

    stage: int
    optimizer: str  # where: device, cpu, nvme
    parameters: str
    reduce_bucket: int
    buffers: int  # of reduce_bucket elements
    max_live: int
    prefetch: int
    sub_group: int
    swap_buffers: int
    parameter_buffers: int  # elements
    max_in_cpu: int
    pinned: bool

    @classmethod
    def read(cls, ds_config: Mapping[str, Any], *, cuda: bool) -> "Zero":
        """From the JSON's ``zero_optimization``."""
        zero = ds_config.get("zero_optimization", {})
        optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
        stage = zero_stage(ds_config)
        overlap = zero.get("overlap_comm")
        overlap = stage == 3 if overlap is None else overlap

        def where(part: Mapping[str, Any]) -> str:
            return {"none": "device"}.get(part.get("device", "none"), part.get("device", "none"))

        return cls(
            stage=stage,
            optimizer=where(optimizer),
            parameters=where(parameters),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buffers=2 if overlap and stage < 3 else 1,
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            swap_buffers=int(optimizer.get("buffer_count", 4)),
            parameter_buffers=int(parameters.get("buffer_count", 5)) * int(parameters.get("buffer_size", 1e8)),
            max_in_cpu=int(parameters.get("max_in_cpu", 1e9)),
            pinned=cuda and bool((optimizer or parameters).get("pin_memory", True)),
        )


@dataclass(frozen=True)
class Job:
    """One process's share of a run."""

    config: TrainConfig
    zero: Zero | None  # None: plain torch
    cuda: bool
    bf16: bool
    world: int
    rows_per_answer: int
    segment_rows: int  # of the longest rows, as many as a segment takes
    strategy: str
    why: str
    whole_gradients: bool  # whether ``deferred`` could be used
    reference: str
    length: int  # tokens of a row
    scored: int  # positions scored in a row

    @property
    def pairs(self) -> int:
        """Of a micro-batch."""
        return self.config.per_device_train_batch_size

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return 2 * self.pairs * self.rows_per_answer

    @property
    def rows_at_once(self) -> int:
        """Rows of the largest forward with a graph."""
        most = {"none": self.rows, "deferred": self.rows_per_answer}.get(self.strategy, self.rows)
        return most if self.strategy == "none" else min(most, self.segment_rows)

    @property
    def segments(self) -> int:
        """Forwards with a graph in a micro-batch."""
        if self.strategy == "deferred":
            return 2 * self.pairs * -(-self.rows_per_answer // self.rows_at_once)
        return -(-self.rows // self.rows_at_once)

    @property
    def backwards(self) -> int:
        """Backwards of an optimizer step after which an engine reduces gradients."""
        per_micro = self.segments if self.strategy == "two_pass" else 1
        return per_micro * self.config.gradient_accumulation_steps

    @property
    def reference_rows(self) -> int:
        """Rows of a forward of the reference."""
        return min(self.rows, self.segment_rows)

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else 4


def resolve(
    config: TrainConfig,
    module: nn.Module,
    *,
    cuda: bool,
    world: int,
    second_model: Callable[[], float],
    scored: int | None = None,
) -> Job:
    """Settings → job. ``module``: what would be trained, on the meta device. ``second_model()``: the part of the memory
    that a copy of it would take, for ``--reference auto``. ``scored``: scored positions of a row; default: all of the
    longest answer."""
    bf16 = build.choose_bf16(config, able=cuda)
    place: Any = SimpleNamespace(size=world, device=torch.device("cuda" if cuda else "cpu"))
    ds_config = _ds_config(config, bf16=bf16, cuda=cuda, world=world)
    engine: Any = SimpleNamespace(hands_gradients_over=False, no_sync_obstacle=lambda: None)
    if ds_config is not None:
        held = SimpleNamespace(config=ds_config, optimizer=None, world=place, module=module)
        engine.hands_gradients_over = hands_gradients_over(ds_config, world)
        engine.no_sync_obstacle = partial(DeepSpeedEngine.no_sync_obstacle, held)  # type: ignore[arg-type]
    loss = build.make_loss(config)
    check_reference(config, loss)
    segments = build.choose_segments(config, place)
    shape = micro_batch_shape(config, couples_pairs=loss.couples_pairs)
    strategy, why = choose_strategy(config.segmentation, engine=engine, segments=segments, shape=shape)
    return Job(
        config=config,
        zero=None if ds_config is None else Zero.read(ds_config, cuda=cuda),
        cuda=cuda,
        bf16=bf16,
        world=world,
        rows_per_answer=shape.rows_per_answer,
        segment_rows=segments.rows or max(1, segments.tokens // config.max_length),
        strategy=strategy,
        why=why,
        whole_gradients=engine.no_sync_obstacle() is None,
        reference=choose_mode(config, loss, share=second_model)[0],
        length=config.max_length,
        scored=scored or config.max_length - config.max_prompt_length,
    )


def _ds_config(config: TrainConfig, *, bf16: bool, cuda: bool, world: int) -> dict[str, Any] | None:
    """The DeepSpeed configuration as the run completes it; None for plain torch."""
    if not build.uses_deepspeed(config):
        return None
    return complete_ds_config(
        read_ds_config(Path(config.ds_config or "")),
        OptimizerOptions(learning_rate=1e-6, max_grad_norm=config.max_grad_norm),
        micro_batch_size=config.per_device_train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        world_size=world,
        bf16=bf16,
        cuda=cuda,
    )
