"""What a layer that is run again in the backward keeps of its first run: ``--checkpoint_keeps``.

Keeping the outputs of some operations saves running those a second time, for their size in memory (torch's selective
activation checkpointing, by operation).
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward"),
)
PRODUCTS = ("mm", "addmm", "bmm")
KEEPS = {"nothing": (), "attention": ATTENTION, "products": (*ATTENTION, *PRODUCTS)}


def keeping(what: str) -> dict[str, Any]:
    """Arguments for torch's ``checkpoint`` that have it keep outputs of ``what``; none for "nothing"."""
    if not KEEPS[what]:
        return {}
    kept = frozenset(getattr(torch.ops.aten, name) for name in KEEPS[what] if hasattr(torch.ops.aten, name))
    return {"context_fn": partial(create_selective_checkpoint_contexts, partial(_policy, kept))}


def _policy(kept: frozenset, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    packet = getattr(operation, "overloadpacket", operation)
    return CheckpointPolicy.MUST_SAVE if packet in kept else CheckpointPolicy.PREFER_RECOMPUTE
