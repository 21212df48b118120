"""What distinguishes one family of masked diffusion models from another, as a small value.

No torch here: the noise, the encoder and the launch scripts read a spec without loading a model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    `mask_token_id` replaces masked tokens; `terminator_id` ends an answer and is scored; `pad_token_id` fills.
    `logit_shift`: token i is predicted by the output at position i - logit_shift (1 for models made from
    autoregressive ones). `block_class`: the transformer block, for engines that shard per block.
    `template`: "chat" when the tokenizer's chat template is what the model was trained with, else "plain".
    `stop_token_ids` end an answer too when a model writes them (end-of-turn tokens); they are not the scored one.
    `block_size`: of a block-causal family, whose tokens see their own block and those before it; None: full attention.
    `lora_targets`: regular expression of the linear modules LoRA adapts by default (never the LM head).
    """

    name: str
    mask_token_id: int
    terminator_id: int
    pad_token_id: int
    block_class: str
    lora_targets: str
    logit_shift: int = 0
    template: str = "plain"
    stop_token_ids: tuple[int, ...] = ()
    block_size: int | None = None

    @property
    def terminators(self) -> frozenset[int]:
        """Every token that ends an answer when sampling."""
        return frozenset({self.terminator_id, *self.stop_token_ids})


LLADA_LORA_TARGETS = r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"
LLADA2_LORA_TARGETS = (
    r".*\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj))"
)
DECODER_LORA_TARGETS = r".*\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
