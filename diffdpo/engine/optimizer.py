"""AdamW's settings, as every engine takes them, and what the optimizers of ``--optim`` keep. No torch in here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffdpo.settings.engine import EngineSettings


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW's settings. ``learning_rate`` is the peak; each step is told its own."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 0.0  # 0: no clipping
    name: str = "adamw_torch"  # of ``--optim``

    @classmethod
    def of(cls, settings: EngineSettings) -> "OptimizerOptions":
        """From the flags, the rate of which must have been chosen by now."""
        assert settings.learning_rate is not None, "config.resolve has chosen one"
        return cls(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            epsilon=settings.adam_epsilon,
            max_grad_norm=settings.max_grad_norm,
            name=settings.optim,
        )


EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
SMALL, BLOCK = 4096, 256  # of bitsandbytes: smaller tensors stay fp32; weights that share a scale


def state_bytes(name: str, shape: Sequence[int], *, in_block: bool = True) -> int:
    """What the optimizer of ``--optim`` keeps of a weight of this shape. ``in_block``: no embedding and no head."""
    size = math.prod(shape)
    if name in EIGHT_BIT and size >= SMALL:
        return 2 * size + 2 * 4 * math.ceil(size / BLOCK)
    if name == "adafactor":
        return 4 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else 4 * size
    if name == "muon" and len(shape) == 2 and in_block:
        return 4 * size
    return 8 * size
