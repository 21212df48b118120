"""Which kinds of device go a GPU's ways, and what each kind has.

Asked here alone, so that a test can send another device the same ways.
"""

from typing import Any, Protocol

import torch


class GpuKind(Protocol):
    """What the code asks of a kind of GPU. Bytes."""

    def total_memory(self, device: torch.device) -> int:
        """All there is."""
        ...

    def held_by_others(self, device: torch.device) -> int:
        """What this process's allocator does not hold: other programs, the driver's context, libraries."""
        ...

    def peak_allocated(self, device: torch.device) -> int:
        """The most in tensors since the last reset."""
        ...

    def peak_reserved(self, device: torch.device) -> int:
        """The most that the allocator took from the device since the last reset."""
        ...

    def reset_peaks(self, device: torch.device) -> None:
        """From now on, with nothing kept that is not in use."""
        ...

    def synchronize(self, device: torch.device) -> None:
        """Wait until all that was asked for is computed."""
        ...

    def tiles_flash(self, device: torch.device) -> bool:
        """Whether flash attention over rows of unequal length runs there."""
        ...

    def has_bf16(self, device: torch.device) -> bool:
        """Whether bfloat16 runs at full speed."""
        ...

    def name(self, device: torch.device) -> str:
        """By its maker."""
        ...

    def timed_event(self) -> Any:
        """A mark of now in the stream of work: ``synchronize()``, and ``elapsed_time(later)`` in milliseconds."""
        ...

    def streams(self) -> Any:
        """``Stream(device)``, ``current_stream(device)``, ``stream(it)`` as in torch.cuda: copies run beside work."""
        ...

    def page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Room of the host for ``tensor``'s numbers, from and to which copies run beside work."""
        ...


class Cuda:
    """NVIDIA's, through torch.cuda."""

    def total_memory(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).total_memory

    def held_by_others(self, device: torch.device) -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)

    def peak_allocated(self, device: torch.device) -> int:
        return torch.cuda.max_memory_allocated(device)

    def peak_reserved(self, device: torch.device) -> int:
        return torch.cuda.max_memory_reserved(device)

    def reset_peaks(self, device: torch.device) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def tiles_flash(self, device: torch.device) -> bool:
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def has_bf16(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)

    def name(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def timed_event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def streams(self) -> Any:
        return torch.cuda

    def page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)


KINDS: dict[str, GpuKind] = {"cuda": Cuda()}
"""By torch's name of the kind of device."""


def is_gpu(device: torch.device) -> bool:
    """Whether it goes a GPU's ways."""
    return device.type in KINDS


def kind_of(device: torch.device) -> GpuKind:
    """The ways of a device that is a GPU."""
    return KINDS[device.type]
