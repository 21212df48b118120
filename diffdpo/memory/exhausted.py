"""Which errors say that memory ran out."""

import gc

import torch

WORDS = (
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
    "alloc_failed",  # cuBLAS, cuDNN
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a failed allocation is behind it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def release_memory() -> None:
    """Give back what a computation that failed has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
