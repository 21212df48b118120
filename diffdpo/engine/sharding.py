"""What an engine cuts over its processes, where the pieces live, and how large its buffers are. No torch in here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharding:
    """Which parts of the training state each process holds 1/N of, and on what: device, cpu or nvme.

    ``over``: N where it is not all processes (groups of N hold a copy each). The sizes below are DeepSpeed's, in
    elements, with its defaults (0.19); FSDP2 has none.
    """

    optimizer: bool = False
    gradients: bool = False
    parameters: bool = False
    optimizer_on: str = "device"
    parameters_on: str = "device"
    over: int = 0
    reduce_bucket: int = 0
    buffers: int = 1  # of reduce_bucket elements
    max_live: int = 0
    prefetch: int = 0
    sub_group: int = 0
    swap_buffers: int = 0
    parameter_buffers: int = 0
    max_in_cpu: int = 0
    pinned: bool = False

    @property
    def any(self) -> bool:
        """Whether anything is cut at all."""
        return self.optimizer or self.gradients or self.parameters

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lives off the device."""
        return self.optimizer_on != "device"

    @property
    def stage(self) -> int:
        """ZeRO's word for it."""
        return self.optimizer + self.gradients + self.parameters


def sharding_of(ds_config: Mapping[str, Any], *, cuda: bool = False) -> Sharding:
    """From a DeepSpeed JSON's ``zero_optimization``; ``cuda``: on a GPU, where memory can be page-locked."""
    zero = ds_config.get("zero_optimization", {})
    optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    stage = int(zero.get("stage", 0))
    overlap = zero.get("overlap_comm")
    overlap = stage == 3 if overlap is None else overlap

    def size(part: Mapping[str, Any], key: str, default: float) -> int:
        value = part.get(key, default)
        # what is no number is told by DeepSpeed's own check, which looks at every key
        return int(value) if isinstance(value, (int, float)) else int(default)

    def where(part: Mapping[str, Any]) -> str:
        return {"none": "device"}.get(part.get("device", "none"), part.get("device", "none"))

    return Sharding(
        optimizer=stage >= 1,
        gradients=stage >= 2,
        parameters=stage == 3,
        optimizer_on=where(optimizer),
        parameters_on=where(parameters),
        reduce_bucket=size(zero, "reduce_bucket_size", 5e8),
        buffers=2 if overlap and stage < 3 else 1,
        max_live=size(zero, "stage3_max_live_parameters", 1e9),
        prefetch=size(zero, "stage3_prefetch_bucket_size", 5e7),
        sub_group=size(zero, "sub_group_size", 1e9),
        swap_buffers=size(optimizer, "buffer_count", 4),
        parameter_buffers=size(parameters, "buffer_count", 5) * size(parameters, "buffer_size", 1e8),
        max_in_cpu=size(parameters, "max_in_cpu", 1e9),
        pinned=cuda and bool((optimizer or parameters).get("pin_memory", True)),
    )
