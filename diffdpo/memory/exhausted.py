"""Which errors say that memory ran out, and what the user is told."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffdpo.errors import UserError
from diffdpo.memory.allocator import give_freed_memory_back

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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for the user."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@contextmanager
def told_if_exhausted(where: str, instead: str) -> Iterator[None]:
    """UserError in place of a failed allocation ``where`` nothing can be repeated; ``instead``: what to change."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory {where} ({first_line(error)}); {instead}") from None


def release_memory() -> None:
    """Give back what a computation that failed has left behind."""
    gc.collect()
    give_freed_memory_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
