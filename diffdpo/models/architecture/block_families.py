"""Block diffusion models made from autoregressive ones: SDAR (and TraDo, DiRL) with Qwen3's names, Fast-dLLM v2 with
Qwen2.5's.

Attention is block-causal: a token sees its own block and the blocks before it, counted from the start of the sequence.
SDAR's logits are unshifted. Fast-dLLM's are shifted by one: the first token of a block is predicted by the last of the
block before, which is clean when that block is done, as its sampler does it.
"""

from typing import ClassVar

from diffdpo.models.architecture.dream import (
    SUPPORTED,
    DreamConfig,
    DreamModel,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
    register,
)


class SDARConfig(Qwen3DiffusionConfig):
    """The published `config.json` of SDAR; published with blocks of 4 to 64."""

    model_type = "sdar"
    supported: ClassVar[dict[str, tuple]] = SUPPORTED | {"use_regular_causal": (False, None)}
    optional_keys: ClassVar[frozenset[str]] = DreamConfig.optional_keys | {"block_size", "use_regular_causal"}
    least_block: ClassVar[int | None] = 1

    block_size: int | None = None

    @property
    def output_bias(self) -> bool:
        """As in Qwen3, `attention_bias` is of all four projections."""
        return self.qkv_bias


class FastDLLMQwenConfig(Qwen2DiffusionConfig):
    """The published `config.json` of Fast-dLLM v2: Qwen2.5's with `bd_size`, the tokens of a block."""

    model_type = "Fast_dLLM_Qwen"
    optional_keys: ClassVar[frozenset[str]] = DreamConfig.optional_keys | {"bd_size"}
    attribute_map: ClassVar[dict[str, str]] = {"block_size": "bd_size"}
    least_block: ClassVar[int | None] = 1

    bd_size: int | None = None


class SDARForCausalLM(DreamModel):
    """Under the published name."""

    config_class = SDARConfig


class Fast_dLLM_QwenForCausalLM(DreamModel):
    """Under the published name."""

    config_class = FastDLLMQwenConfig


for model_class in (SDARForCausalLM, Fast_dLLM_QwenForCausalLM):
    register(model_class)
