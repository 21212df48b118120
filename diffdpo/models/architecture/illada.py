"""iLLaDA: LLaDA's successor, with full attention, unshifted logits, Llama's names and a tied head.

Its config declares no mask token (the published code takes id 5). Not here, and refused by name: `layer_norm_eps` (it
would make LayerNorm of the norms), dropout, rotary scalings; a head size other than width over heads, which the
published code does not read.
"""

from typing import ClassVar

from diffdpo.models.architecture.dream import OPTIONAL, SUPPORTED, DreamConfig, DreamModel, register


class ILLaDAConfig(DreamConfig):
    """The published `config.json`. An absent `tie_word_embeddings` means a tied head: the published code's default."""

    model_type = "illada"
    supported: ClassVar[dict[str, tuple]] = {key: value for key, value in SUPPORTED.items() if key != "mlp_bias"} | {
        "resid_pdrop": (0.0, None),
        "layer_norm_eps": (None,),
    }
    optional_keys: ClassVar[frozenset[str]] = frozenset({*OPTIONAL, *supported, "mlp_bias"})
    rotary_types: ClassVar[tuple[str, ...]] = ("default",)
    qkv_bias_default: ClassVar[bool] = False

    tie_word_embeddings: bool = True
    mlp_bias: bool | None = None

    def check(self) -> "ILLaDAConfig":
        """As of the family it derives from."""
        super().check()
        size = self.hidden_size // self.num_attention_heads
        self.refuse(
            [
                (type(self.mlp_bias) not in (bool, type(None)), f"has mlp_bias={self.mlp_bias!r}; expected: bool"),
                (
                    self.head_dim not in (None, size),
                    f"has head_dim={self.head_dim}; supported: hidden_size / num_attention_heads = {size}",
                ),
            ]
        )
        return self

    @property
    def output_bias(self) -> bool:
        """Here `attention_bias` is of all four projections."""
        return self.qkv_bias

    @property
    def mlp_biased(self) -> bool:
        """`mlp_bias`."""
        return bool(self.mlp_bias)


class ILLaDAForCausalLM(DreamModel):
    """Under the published name."""

    config_class = ILLaDAConfig


register(ILLaDAForCausalLM)
