"""GPUs and hosts as a roofline sees them. Figures are the makers' (dense, no sparsity); what of them is reached is an
assumption, stated here and printed with every plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
class Gpu:
    """``memory`` bytes; rates in FLOP/s for 16-bit matrix products with fp32 sums and for fp32 (TF32 off, torch's
    default); ``bandwidth`` and ``link`` (host to device, one way) in bytes/s."""

    name: str
    memory: int
    half: float
    single: float
    bandwidth: float
    link: float


@dataclass(frozen=True)
class Host:
    """``memory`` bytes; ``bandwidth`` of memory in bytes/s, ``disk`` NVMe bytes/s each way."""

    memory: int
    bandwidth: float = 50e9
    disk: float = 5e9


T, G = 1e12, 1e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 4080", 16 * GIB, 97.5 * T, 48.7 * T, 717 * G, 32 * G),
        Gpu("RTX 4090", 24 * GIB, 165.2 * T, 82.6 * T, 1008 * G, 32 * G),
        Gpu("A100", 80 * GIB, 312 * T, 19.5 * T, 2039 * G, 32 * G),
        Gpu("H100", 80 * GIB, 989 * T, 67 * T, 3350 * G, 64 * G),
        Gpu("H200", 141 * 10**9, 989 * T, 67 * T, 4800 * G, 64 * G),
    )
}


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
    wanted = _plain(name)
    found = [gpu for key, gpu in GPUS.items() if wanted in (_plain(key), _plain(key).removeprefix("rtx"))]
    if not found:
        raise UserError(f"--gpu {name!r} is unknown; known: {', '.join(GPUS)}. For another give --gpu_memory alone")
    return replace(found[0], memory=memory) if memory else found[0]


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia").removeprefix("geforce")
