"""What a run would do, as far as its memory and time depend on it: settings resolved by the run's own rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdpo import build
from diffdpo.config import TrainConfig, read_ds_config
from diffdpo.engine.base import OptimizerOptions
from diffdpo.engine.deepspeed import complete_ds_config, zero_stage
from diffdpo.noise.estimators import MAX_EXACT_LENGTH, num_rows
from diffdpo.reference.modes import check_reference, choose_mode
from diffdpo.step.backward import choose_strategy


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
    rows: int  # of a micro-batch
    segment_rows: int
    strategy: str
    why: str
    reference: str
    length: int  # tokens of a row
    scored: int  # positions scored in a row

    @property
    def segments(self) -> int:
        """Forwards with a graph in a micro-batch."""
        return 1 if self.strategy == "none" else -(-self.rows // self.segment_rows)

    @property
    def rows_at_once(self) -> int:
        """Rows of the largest forward."""
        return self.rows if self.strategy == "none" else min(self.rows, self.segment_rows)

    @property
    def backwards(self) -> int:
        """Backward calls of an optimizer step."""
        per_micro = self.segments if self.strategy in ("two_pass", "deferred") else 1
        return per_micro * self.config.gradient_accumulation_steps

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else 4


def resolve(
    config: TrainConfig, *, cuda: bool, world: int, second_model: Callable[[], float], scored: int | None = None
) -> Job:
    """Settings → job. ``second_model()``: the part of the memory that a copy of the model would take, for
    ``--reference auto``. ``scored``: scored positions of a row; default: all of the longest answer."""
    bf16 = build.choose_bf16(config, able=cuda)
    zero = None
    if build.uses_deepspeed(config):
        completed = complete_ds_config(
            read_ds_config(Path(config.ds_config or "")),
            OptimizerOptions(learning_rate=1e-6, max_grad_norm=config.max_grad_norm),
            micro_batch_size=config.per_device_train_batch_size,
            accumulation_steps=config.gradient_accumulation_steps,
            world_size=world,
            bf16=bf16,
            cuda=cuda,
        )
        zero = Zero.read(completed, cuda=cuda)
    loss = build.make_loss(config)
    check_reference(config, loss)
    per_answer = num_rows(config.score_estimator, length=MAX_EXACT_LENGTH, num_samples=config.num_mc_samples)
    rows = 2 * per_answer * config.per_device_train_batch_size
    segment_rows = build.choose_segment_rows(config, torch.device("cuda" if cuda else "cpu"))
    strategy, why = choose_strategy(
        config.segmentation,
        rows=rows,
        segment_rows=segment_rows,
        keeps_gradients_sharded=zero is not None and zero.stage == 3,
        whole_batch=loss.whole_batch,
    )
    return Job(
        config=config,
        zero=zero,
        cuda=cuda,
        bf16=bf16,
        world=world,
        rows=rows,
        segment_rows=segment_rows,
        strategy=strategy,
        why=why,
        reference=choose_mode(config, loss, share=second_model)[0],
        length=config.max_length,
        scored=scored or config.max_length - config.max_prompt_length,
    )
