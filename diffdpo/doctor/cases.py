"""What the self-test compares: ways to compute on the device, each with the tolerances it must keep and what it needs.

Tolerances are four times or more what correct kernels show on CPUs (docs/LOG.md, 2026-11-28): fp32 rounds at 1e-7, and
a gradient that is a difference of two alike ones loses a digit or two of that; bf16 keeps 8 bits. A wrong kernel (a
mask, a position, a scale) is off by a hundred times as much.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu
from diffdpo.models.architecture.compiled import check_compiler
from diffdpo.optional import fault_of

BLOCK_SIZE = 8


@dataclass(frozen=True)
class Tolerances:
    """Most that may be off: ``score`` in nats a token, ``gradient`` relative to its norm, ``loss`` of any step."""

    score: float
    gradient: float
    loss: float


FP32 = Tolerances(score=1e-5, gradient=1e-4, loss=1e-4)
BF16 = Tolerances(score=1e-2, gradient=1e-1, loss=3e-2)


@dataclass(frozen=True)
class Case:
    """One way to compute. ``scorer``: options of MaskedLogProbs; ``tolerates``: see there."""

    name: str
    dtype: str = "float32"
    scorer: dict[str, Any] = field(default_factory=dict)
    strategy: str = "none"
    nf4: bool = False
    blocks: bool = False

    @property
    def tolerates(self) -> Tolerances:
        """By the precision of its products."""
        return FP32 if self.dtype == "float32" else BF16

    def obstacle(self, device: torch.device) -> str:
        """Why it cannot be tried here; '' where it can."""
        if self.nf4 and (fault := fault_of("bitsandbytes")):
            return fault
        if self.scorer.get("use_liger"):
            if device.type != "cuda":
                return "Liger's kernel needs a GPU"
            if fault := fault_of("liger_kernel"):
                return fault
        if self.scorer.get("flex") and not is_gpu(device):
            return "FlexAttention has no backward on a CPU"
        if self.scorer.get("compile_blocks"):
            if self.dtype != "float32" and device.type != "cuda":
                return "compiled for a GPU only: on a CPU it takes minutes, and fp32 has shown the graph"
            try:
                check_compiler()
            except UserError as fault:
                return str(fault).removeprefix("--torch_compile ").partition(";")[0]
        return ""


PADDED, EXACT = {"max_waste": 1.0}, {"max_waste": 0.0}
COMPILED = {"compile_blocks": True}
CASES = (
    Case("fp32"),
    Case("fp32, attention by equal lengths", scorer=EXACT),
    Case("fp32, attention under a mask", scorer=PADDED),
    Case("fp32, block-causal attention", blocks=True),
    Case("fp32, block-causal, FlexAttention", scorer={"flex": True}, blocks=True),
    Case("fp32, head in small chunks", scorer={"logits_budget": 2**16}),
    Case("fp32, two_pass, layers recomputed", scorer={"layer_checkpointing": True}, strategy="two_pass"),
    Case("fp32, deferred", strategy="deferred"),
    Case("fp32, compiled", scorer=COMPILED),
    Case("fp32, Liger", scorer={"use_liger": True}),
    Case("bf16", "bfloat16"),
    Case("bf16, attention under a mask", "bfloat16", scorer=PADDED),
    Case("bf16, block-causal attention", "bfloat16", blocks=True),
    Case("bf16, block-causal, FlexAttention", "bfloat16", scorer={"flex": True}, blocks=True),
    Case("bf16, compiled", "bfloat16", scorer=COMPILED),
    Case("bf16, Liger", "bfloat16", scorer={"use_liger": True}),
    Case("NF4 + LoRA in fp32", nf4=True),
    Case("NF4 + LoRA in bf16", "bfloat16", nf4=True),
    Case("NF4 + LoRA in bf16, deferred", "bfloat16", nf4=True, strategy="deferred"),
)
