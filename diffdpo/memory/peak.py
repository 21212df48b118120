"""The most memory this process has used."""

import resource
import sys

import torch

from diffdpo.gpus import is_gpu, kind_of

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """On a GPU what torch's allocator held at most; on the CPU the largest resident set of the process."""
    if is_gpu(device):
        return kind_of(device).peak_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
