"""The arithmetic a training step cannot do without: matrix products of a model, forward and backward, from its shapes.

A forward of a row of T tokens, M of them scored: 2 FLOPs a weight and token in the blocks, 2 a weight and scored token
in the head and in what follows the last attention, and 4 T^2 times the width of attention in every layer. A backward
is as much again for what flows through, and as much for every weight that is trained. What memory makes a run do
twice (recomputation, two passes) is not in it, so rates that follow from it compare runs with one another (Chowdhery
et al., PaLM, arXiv 2204.02311, appendix B).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffdpo.models.architecture.backbone import native

INTO_ATTENTION = ("q_proj", "k_proj", "v_proj", "query_key_value")


@dataclass(frozen=True)
class ModelWork:
    """Weights that every token meets, those of them that are trained; the same of weights that scored tokens alone
    meet; and layers times the width of attention."""

    every: float
    every_trained: float
    scored: float
    scored_trained: float
    attention: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelWork":
        """The work of a native model, also in shards, in 4 bits or with adapters; of the experts that a token meets."""
        base = native(model)
        config = base.config
        share = config.num_experts_per_tok / config.num_experts if getattr(config, "num_experts", None) else 1.0
        sums = dict.fromkeys(("every", "every_trained", "scored", "scored_trained"), 0.0)
        last = f"{len(base.blocks) - 1}."
        linears = {name: m for name, m in base.blocks.named_modules() if isinstance(m, nn.Linear)}
        for name, module in {**linears, "head": base.head}.items():
            if hasattr(module, "base_layer"):  # an adapter's wrapper: what it wraps is in the list too
                continue
            late = name.startswith(last) and not any(part in INTO_ATTENTION for part in name.split("."))
            key = "scored" if name == "head" or late else "every"
            size = module.in_features * module.out_features * (share if ".experts." in name else 1.0)
            sums[key] += size
            sums[f"{key}_trained"] += size * module.weight.requires_grad
        width = getattr(config, "head_dim", None)
        wide = width * config.num_attention_heads if width else base.head.in_features
        return cls(**sums, attention=len(base.blocks) * wide)

    def of_rows(self, lengths_R: Tensor, scored: int, *, forwards: int) -> float:
        """FLOPs of rows of these lengths, ``scored`` tokens of them scored: one forward with its backward, and
        ``forwards`` more without (the reference's)."""
        tokens, squares = float(lengths_R.sum()), float(lengths_R.to(torch.float64).square().sum())
        attention = 4 * self.attention * squares
        forward = 2 * self.every * tokens + 2 * self.scored * scored + attention
        for_weights = 2 * self.every_trained * tokens + 2 * self.scored_trained * scored
        return (2 + forwards) * forward + attention + for_weights
