"""GPUs and hosts as a roofline sees them. Figures are the makers' (dense, no sparsity); what of them is reached is an
assumption, stated here and printed with every plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffdpo.cards import GPUS, Gpu, plain
from diffdpo.errors import UserError
from diffdpo.planner.sizes import GIB, gib

MATMUL_SHARE = 0.55
"""Of the peak rate, in matrix products of training shapes."""
BANDWIDTH_SHARE = 0.8
"""Of memory bandwidth, in elementwise passes."""
LINK_SHARE = 0.8
"""Of PCIe bandwidth, from page-locked memory."""
CONTEXT = int(1.2 * GIB)
"""CUDA context, library code, workspaces of cuBLAS, NCCL and bitsandbytes on a GPU; assumed, not measured."""
SLACK = 0.05
"""Of what is allocated and freed within a step, lost to fragmentation in torch's caching allocator."""
PROCESS = 4 * GIB
"""Resident memory of a training process on the host before any tensor: Python, torch, CUDA libraries, data."""


@dataclass(frozen=True)
class Host:
    """``memory`` bytes; ``bandwidth`` of memory in bytes/s, ``disk`` NVMe bytes/s each way."""

    memory: int
    bandwidth: float = 50e9
    disk: float = 5e9

    def share(self, processes: int) -> "Host":
        """What one of the processes has of it while all of them use it."""
        return Host(self.memory // processes, self.bandwidth / processes, self.disk / processes)


def find_gpu(name: str | None, memory: int | None, rates: Mapping[str, Any] | None = None) -> Gpu | None:
    """The GPU of ``--gpu``, with ``--gpu_memory`` and ``rates`` (fields of `Gpu`) in place of its own where given.

    With a memory alone: the smallest known GPU that has as much, at that memory. None when neither is given. UserError
    for rates of no GPU.
    """
    gpu = _known(name, memory)
    if gpu is None and rates:
        raise UserError("--gpu_flops and the like are rates of a GPU; give --gpu_memory or --gpu with them")
    return replace(gpu, name=f"{gpu.name}, rates as given", **rates) if gpu and rates else gpu


def _known(name: str | None, memory: int | None) -> Gpu | None:
    if name is None and memory is None:
        return None
    if name is None:
        assert memory is not None
        fits = [gpu for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory) if gpu.memory >= memory * 0.95]
        like = fits[0] if fits else GPUS["H200"]
        return replace(like, name=f"{gib(memory):.0f} GiB like {like.name}", memory=memory)
    wanted = plain(name)
    found = [gpu for key, gpu in GPUS.items() if wanted in (plain(key), plain(key).removeprefix("rtx"))]
    if not found:
        raise UserError(f"--gpu {name!r} is unknown; known: {', '.join(GPUS)}. For another give --gpu_memory alone")
    return replace(found[0], memory=memory) if memory else found[0]
