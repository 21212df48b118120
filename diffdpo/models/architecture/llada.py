"""LLaDA (8B Base, Instruct, 1.5; grouped-query and tied-head relatives): the published layout, read and written as is.

A Llama-like pre-norm transformer without causal mask; logits are not shifted. Two modules are called `ff_out`: every
block's down projection and, beside the blocks, the LM head. Not here: the `sequential` block type, ALiBi, learned
positions and dropout, which no released checkpoint uses; a config asking for them is refused by name.

Shapes: N tokens in the stream, M kept tokens, K hidden size, H heads, G key/value heads, D head size.
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
)

from diffdpo.models.architecture.backbone import MaskedLM, RowLayout, initialise, mark_residual
from diffdpo.models.architecture.layers import RMSNorm, RotaryTable, VocabularyHead, rotate
from diffdpo.models.architecture.published_config import PublishedConfig, Setting

REQUIRED = {
    **dict.fromkeys(("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "embedding_size"), int),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), float),
    **dict.fromkeys(("layer_norm_type", "activation_type", "block_type"), str),
    "weight_tying": bool,
    "rope": bool,
    "mask_token_id": int,
}
OPTIONAL = {
    **dict.fromkeys(("n_kv_heads", "max_sequence_length"), int),
    **dict.fromkeys(("multi_query_attention", "rope_full_precision", "include_qkv_bias", "scale_logits"), bool),
}
# What this module computes; a config that says otherwise describes another model. Missing optional keys are fine
# where the published code's default is the value given here, and required above where it is not. Its default for the
# dropouts is 0.1: they mean nothing here and are always written as 0, lest that code train a saved model with them.
SUPPORTED: dict[str, tuple] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False, None),
    "block_group_size": (1, None),
    "input_emb_norm": (False, None),
    "attention_layer_norm": (False, None),
    "include_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "layer_norm_with_affine": (True, None),
    "attention_dropout": (0.0,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "rope_scaling": (None,),
}


class LLaDAConfig(PublishedConfig):
    """The published `config.json`. Fields start as None: a missing key is an error, never another model."""

    model_type = "llada"
    optional_keys: ClassVar[frozenset[str]] = frozenset({*OPTIONAL, *SUPPORTED})
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "tie_word_embeddings": "weight_tying",
        "max_position_embeddings": "max_sequence_length",
    }

    d_model: Setting = None
    n_layers: Setting = None
    n_heads: Setting = None
    n_kv_heads: int | None = None
    multi_query_attention: bool | None = None
    mlp_hidden_size: Setting = None
    vocab_size: Setting = None
    embedding_size: Setting = None
    max_sequence_length: int | None = None
    rope: Setting = None
    rope_theta: Setting = None
    rope_full_precision: bool | None = None
    rms_norm_eps: Setting = None
    layer_norm_type: Setting = None
    activation_type: Setting = None
    block_type: Setting = None
    weight_tying: Setting = None
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    include_qkv_bias: bool | None = None
    scale_logits: bool | None = None
    mask_token_id: Setting = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def create(
        cls,
        *,
        d_model: int,
        n_layers: int,
        n_heads: int,
        vocab_size: int,
        mask_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        max_sequence_length: int = 4096,
        weight_tying: bool = False,
        **other,
    ) -> "LLaDAConfig":
        """A complete config of a new model. The MLP defaults to 8/3 of the width, rounded up to a multiple of 32."""
        fixed = {key: allowed[0] for key, allowed in SUPPORTED.items() if allowed[0] is not None}
        derived = {
            "mlp_hidden_size": mlp_hidden_size or 32 * math.ceil(d_model / 12),
            "n_kv_heads": n_kv_heads or n_heads,
            "embedding_size": vocab_size,
            "rope_theta": 10000.0,
            "rope_full_precision": True,
            "rms_norm_eps": 1e-5,
            "include_qkv_bias": False,
            "scale_logits": False,
            "architectures": ["LLaDAModelLM"],
        }
        return cls(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            max_sequence_length=max_sequence_length,
            weight_tying=weight_tying,
            **(fixed | derived | other),
        )

    def check(self) -> "LLaDAConfig":
        """Raise UserError naming every missing or contradictory key; otherwise return self."""
        self.require(REQUIRED, OPTIONAL)
        self.allow_only(SUPPORTED)
        heads, groups = self.n_heads, self.kv_heads
        meant = {None: groups, True: 1, False: heads}[self.multi_query_attention]
        self.refuse(
            [
                (self.d_model % heads, f"has d_model={self.d_model}, not a multiple of n_heads={heads}"),
                (heads % groups, f"has n_heads={heads}, not a multiple of n_kv_heads={groups}"),
                (
                    (self.d_model // heads) % 2,
                    "gives an odd head size d_model/n_heads; rotary positions need an even one",
                ),
                (groups != meant, f"has multi_query_attention={self.multi_query_attention} and n_kv_heads={groups}"),
                (
                    self.embedding_size < self.vocab_size,
                    f"has embedding_size={self.embedding_size} < vocab_size={self.vocab_size}",
                ),
            ]
        )
        self.check_token_ids(self.embedding_size)
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads: `n_kv_heads`, 1 for multi-query, else as many as query heads."""
        return self.n_kv_heads or (1 if self.multi_query_attention else self.n_heads)


class LLaDABlock(nn.Module):
    """x + attn_out(attention(norm x)), then x + ff_out(silu(ff_proj h) * up_proj h)."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        size, head_size = config.d_model, config.d_model // config.n_heads
        kv_size, bias = config.kv_heads * head_size, bool(config.include_qkv_bias)
        self.head_size = head_size
        self.rope_full_precision = config.rope_full_precision is not False
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_size, bias=bias)
        self.v_proj = nn.Linear(size, kv_size, bias=bias)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_norm = RMSNorm(size, config.rms_norm_eps)
        self.ff_proj = nn.Linear(size, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(size, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, size, bias=False)
        mark_residual(self.attn_out, self.ff_out)

    def forward(self, x_NK: Tensor, rope: tuple[Tensor, Tensor], layout: RowLayout, keep_M: Tensor | None) -> Tensor:
        h_NK = self.attn_norm(x_NK)
        q_NHD, k_NGD, v_NGD = (
            proj(h_NK).unflatten(-1, (-1, self.head_size)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_NHD, k_NGD = (rotate(t, *rope, full_precision=self.rope_full_precision) for t in (q_NHD, k_NGD))
        mixed_NK = layout.attend(q_NHD, k_NGD, v_NGD)
        if keep_M is not None:
            x_NK, mixed_NK = x_NK[keep_M], mixed_NK[keep_M]
        x_NK = x_NK + self.attn_out(mixed_NK)
        h_NK = self.ff_norm(x_NK)
        return x_NK + self.ff_out(F.silu(self.ff_proj(h_NK)) * self.up_proj(h_NK))


class LLaDAModel(nn.Module):
    """Holds the `transformer.*` names of the published checkpoints."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        scale = config.d_model**-0.5 if config.scale_logits else 1.0
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": VocabularyHead(config.d_model, config.embedding_size, scale=scale),
            }
        )


class LLaDAModelLM(MaskedLM):
    """LLaDA with its LM head. Random init: normal(0.02), residual projections scaled by 1/sqrt(2 layers)."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: LLaDAConfig):
        super().__init__(config.check())
        if config.weight_tying:
            self._tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}
        self.model = LLaDAModel(config)
        self.rotary = RotaryTable(config.d_model // config.n_heads, config.rope_theta)
        self.post_init()

    @property
    def embed(self) -> nn.Embedding:
        return self.model.transformer["wte"]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.transformer["blocks"]

    @property
    def final_norm(self) -> RMSNorm:
        return self.model.transformer["ln_f"]

    @property
    def head(self) -> VocabularyHead:
        return self.model.transformer["ff_out"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.transformer["ff_out"] = VocabularyHead.of(new_embeddings, scale=self.head.scale)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.embedding_size = embeddings.num_embeddings
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, num_layers=self.config.n_layers)


for auto_class in (AutoModel, AutoModelForMaskedLM):  # not as a causal one; see `dream.register`
    auto_class.register(LLaDAConfig, LLaDAModelLM)
AutoConfig.register("llada", LLaDAConfig)
