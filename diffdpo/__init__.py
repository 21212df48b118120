"""Diffusion-DPO for masked diffusion language models. Importing this package is cheap: no torch, no deepspeed.

What it offers to Python is in ``diffdpo.api`` and is reached from here: ``train``, ``sft``, ``evaluate``, ``score``,
``generate`` and ``load``; ``Callback`` to listen to a run, ``Result`` of one, and ``UserError`` for what the caller can
mend.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Callback", "DataError", "Result", "UserError", "evaluate", "generate", "load", "score", "sft", "train"]

if TYPE_CHECKING:
    from diffdpo.api import Callback, DataError, Result, UserError, evaluate, generate, load, score, sft, train


def __getattr__(name: str) -> Any:
    """The names of ``diffdpo.api``, which imports torch, at their first use."""
    if name in __all__:
        # train, sft and score are also names of packages and modules here: what is asked for is the function
        import importlib

        return getattr(importlib.import_module("diffdpo.api"), name)
    raise AttributeError(f"module 'diffdpo' has no attribute {name!r}")
