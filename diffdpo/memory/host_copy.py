"""What a backward needs again later, kept on the host meanwhile: ``--activation_offload cpu``.

On a GPU copies run on a stream of their own beside the computation, from and to page-locked memory; what is fetched
next is sent for while the one before it is used.
"""

from typing import Any

import torch
from torch import Tensor

from diffdpo.gpus import is_gpu, kind_of

_STREAMS: dict[torch.device, Any] = {}


class HostCopy:
    """The numbers of ``tensor``, which may be let go. ``before``: what was kept before it and is wanted after it."""

    def __init__(self, tensor: Tensor, before: "HostCopy | None" = None):
        self.device, self.shape, self.before = tensor.device, tensor.shape, before
        self.there: Tensor | None = None
        self.arrived: Any = None
        self.host = self._sent(tensor.detach())

    def _sent(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # of the planner: that it is not on the device is all there is to know
            return tensor.new_empty(0)
        if not is_gpu(tensor.device):
            return tensor
        kind, stream = kind_of(tensor.device), _stream(tensor.device)
        stream.wait_stream(kind.streams().current_stream(tensor.device))
        with kind.streams().stream(stream):
            host = kind.page_locked(tensor)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host

    def send_for(self) -> None:
        """Begin to fetch it."""
        if self.there is not None or not is_gpu(self.device):
            return
        stream = _stream(self.device)
        with kind_of(self.device).streams().stream(stream):  # in whose order it was sent away
            self.there = self.host.to(self.device, non_blocking=True)
        self.arrived = stream.record_event()

    def fetch(self) -> Tensor:
        """The tensor again, to be used now; the one before it is sent for."""
        self.send_for()
        tensor, self.there = self.there, None
        if self.device.type == "meta":
            return self.host.new_empty(self.shape)
        if tensor is None:
            tensor = self.host.to(self.device)
        else:
            current = kind_of(self.device).streams().current_stream(self.device)
            current.wait_event(self.arrived)
            tensor.record_stream(current)
        if self.before is not None:
            self.before.send_for()
        return tensor


def _stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = kind_of(device).streams().Stream(device)
    return _STREAMS[device]
