"""Dream, DiffuCoder and other models made from autoregressive ones: Qwen2, Qwen3 and Llama layouts without causal mask.

Their logits stay shifted by one: the output at position i - 1 predicts token i, and position 0 is never predicted.
The layouts differ in three switches (biases on q, k, v; norms on q and k; the head size), read from the family and
its config. Not here: sliding windows and rotary scalings other than Llama 3's, which are refused by name.

Shapes: N tokens in the stream, M kept tokens, K hidden size, H heads, G key/value heads, D head size.
"""

import math
from typing import Any, ClassVar, cast

import torch
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

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
REQUIRED = {
    **dict.fromkeys((*SHAPE, "vocab_size"), int),
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
}
OPTIONAL = {
    **dict.fromkeys(("head_dim", "max_position_embeddings"), int),
    "rope_theta": float,
    "attention_bias": bool,
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
}
SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu", None),
    "attention_dropout": (0.0, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "mlp_bias": (False, None),
}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class DreamConfig(PublishedConfig):
    """The published `config.json` of Dream and DiffuCoder. Every field starts as None: a missing key is an error."""

    model_type = "Dream"
    optional_keys: ClassVar[frozenset[str]] = frozenset({*OPTIONAL, *SUPPORTED})
    supported: ClassVar[dict[str, tuple]] = SUPPORTED
    rotary_types: ClassVar[tuple[str, ...]] = ("default", "llama3")
    qkv_bias_default: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    hidden_size: Setting = None
    num_hidden_layers: Setting = None
    num_attention_heads: Setting = None
    num_key_value_heads: Setting = None
    intermediate_size: Setting = None
    head_dim: int | None = None
    vocab_size: Setting = None
    rms_norm_eps: Setting = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    attention_dropout: float | None = None
    use_sliding_window: bool | None = None
    tie_word_embeddings: Setting = None
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def check(self) -> "DreamConfig":
        """Raise UserError naming every missing or contradictory key; otherwise return self."""
        self.require(REQUIRED, OPTIONAL)
        self.allow_only(self.supported)
        self._check_rotary()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        layers = set(getattr(self, "layer_types", None) or ()) - {"full_attention"}
        self.refuse(
            [
                (layers, f"has layer_types {', '.join(sorted(layers))}; supported: 'full_attention'"),
                (heads % groups, f"has num_attention_heads={heads}, not a multiple of num_key_value_heads={groups}"),
                (
                    not self.head_dim and self.hidden_size % heads,
                    f"has hidden_size={self.hidden_size}, not a multiple of num_attention_heads={heads}",
                ),
                (self.head_size % 2, f"gives an odd head size {self.head_size}; rotary positions need an even one"),
            ]
        )
        self.check_token_ids(self.vocab_size)
        return self

    def _check_rotary(self) -> None:
        rotary = self.rotary
        theta, kind = rotary["rope_theta"], rotary["rope_type"]
        scaling: dict[str, Any] = {key: rotary.get(key) for key in LLAMA3_KEYS} if kind == "llama3" else {}
        absent = [key for key, value in scaling.items() if value is None]
        odd = {key: value for key, value in {"rope_theta": theta, **scaling}.items() if not _positive(value)}
        twice = [key for key, value in self._scaling.items() if rotary.get(key) != value]
        ramp = kind == "llama3" and not (absent or odd) and scaling["low_freq_factor"] >= scaling["high_freq_factor"]
        self.refuse(
            [
                (theta is None, "lacks rope_theta: add the key to config.json"),
                (
                    twice,
                    "".join(
                        f"has rope_scaling and rope_parameters with another {key} each: leave one out"
                        for key in twice[:1]
                    ),
                ),
                (self.rope_theta not in (None, theta), f"has rope_theta={self.rope_theta} and another one, {theta}"),
                (
                    kind not in self.rotary_types,
                    f"has rotary scaling {kind!r}; supported: {', '.join(self.rotary_types)}",
                ),
                (absent, f"has rotary scaling 'llama3' without {', '.join(absent)}: add the key(s) to config.json"),
                (odd, "".join(f"has {key}={value!r}; expected: a number above 0" for key, value in [*odd.items()][:1])),
                (ramp, "has rotary scaling 'llama3' with low_freq_factor not below high_freq_factor"),
            ]
        )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary(self) -> dict[str, Any]:
        """Rotary settings with `rope_theta` and `rope_type`, from either generation of config files."""
        merged = {"rope_theta": self.rope_theta, "rope_type": "default"} | self._scaling
        return merged | (getattr(self, "rope_parameters", None) or {})

    @property
    def _scaling(self) -> dict[str, Any]:
        """`rope_scaling`, its `type` under the name of today."""
        old = dict(self.rope_scaling or {})
        return ({"rope_type": old.pop("type")} if "type" in old else {}) | old

    @property
    def qkv_bias(self) -> bool:
        return self.qkv_bias_default if self.attention_bias is None else self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return False

    @property
    def mlp_biased(self) -> bool:
        """Whether the MLP's projections have biases."""
        return False


class Qwen2DiffusionConfig(DreamConfig):
    """A Qwen2 checkpoint used bidirectionally with a mask token."""

    model_type = "qwen2"


class Qwen3DiffusionConfig(DreamConfig):
    """A Qwen3 checkpoint used bidirectionally with a mask token."""

    model_type = "qwen3"
    qkv_bias_default = False
    qk_norm = True


class LlamaDiffusionConfig(DreamConfig):
    """A Llama checkpoint used bidirectionally with a mask token."""

    model_type = "llama"
    qkv_bias_default = False


class A2DQwen2Config(Qwen2DiffusionConfig):
    """dLLM's conversion of Qwen2, trained without the shift.

    Its global ("mdlm") and its block diffusion ("bd3lm") checkpoints have the same keys: `block_size` must tell.
    """

    model_type = "a2d-qwen2"
    optional_keys: ClassVar[frozenset[str]] = DreamConfig.optional_keys | {"block_size"}
    least_block: ClassVar[int | None] = 0

    block_size: int | None = None


class A2DQwen3Config(Qwen3DiffusionConfig):
    """dLLM's conversion of Qwen3 (Tiny-A2D), as above."""

    model_type = "a2d-qwen3"
    optional_keys: ClassVar[frozenset[str]] = DreamConfig.optional_keys | {"block_size"}
    least_block: ClassVar[int | None] = 0

    block_size: int | None = None


class A2DLlamaConfig(LlamaDiffusionConfig):
    """dLLM's conversion of Llama, as above."""

    model_type = "a2d-llama"
    optional_keys: ClassVar[frozenset[str]] = DreamConfig.optional_keys | {"block_size"}
    least_block: ClassVar[int | None] = 0

    block_size: int | None = None


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


class SelfAttention(nn.Module):
    """Grouped-query attention, names of the Qwen and Llama checkpoints."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        size, self.head_size = config.hidden_size, config.head_size
        wide, narrow = config.num_attention_heads * self.head_size, config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, size, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        mark_residual(self.o_proj)

    def forward(self, h_NK: Tensor, rope: tuple[Tensor, Tensor], layout: RowLayout, keep_M: Tensor | None) -> Tensor:
        q_NHD, k_NGD, v_NGD = (
            proj(h_NK).unflatten(-1, (-1, self.head_size)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_NHD = rotate(self.q_norm(q_NHD), *rope, full_precision=False)
        k_NGD = rotate(self.k_norm(k_NGD), *rope, full_precision=False)
        mixed_NK = layout.attend(q_NHD, k_NGD, v_NGD)
        return self.o_proj(mixed_NK if keep_M is None else mixed_NK[keep_M])


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj h) * up_proj h)."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        wide, narrow, bias = config.intermediate_size, config.hidden_size, config.mlp_biased
        self.gate_proj = nn.Linear(narrow, wide, bias=bias)
        self.up_proj = nn.Linear(narrow, wide, bias=bias)
        self.down_proj = nn.Linear(wide, narrow, bias=bias)
        mark_residual(self.down_proj)

    def forward(self, h_NK: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h_NK)) * self.up_proj(h_NK))


class DreamDecoderLayer(nn.Module):
    """Pre-norm: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x_NK: Tensor, rope: tuple[Tensor, Tensor], layout: RowLayout, keep_M: Tensor | None) -> Tensor:
        mixed_NK = self.self_attn(self.input_layernorm(x_NK), rope, layout, keep_M)
        x_NK = (x_NK if keep_M is None else x_NK[keep_M]) + mixed_NK
        return x_NK + self.mlp(self.post_attention_layernorm(x_NK))


class DreamBackbone(nn.Module):
    """Holds the `model.*` names of the published checkpoints."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DreamModel(MaskedLM):
    """Dream with its LM head; also Qwen2, Qwen3 and Llama layouts through their configs."""

    config_class = DreamConfig
    base_model_prefix = "model"
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: DreamConfig):
        super().__init__(config.check())
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.model = DreamBackbone(config)
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.rotary = ScaledRotaryTable(config.head_size, config.rotary)
        self.post_init()

    @property
    def embed(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> RMSNorm:
        return self.model.norm

    @property
    def head(self) -> VocabularyHead:
        return self.lm_head

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = cast(nn.Embedding, value)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = VocabularyHead.of(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, num_layers=self.config.num_hidden_layers)


class ScaledRotaryTable(RotaryTable):
    """Rotary table with Llama 3's frequency scaling: long wavelengths stretched by `factor`, a ramp in between."""

    def __init__(self, head_size: int, settings: dict[str, Any]):
        super().__init__(head_size, settings["rope_theta"])
        self.settings = settings

    def frequencies(self, dtype: torch.dtype) -> Tensor:
        frequency = super().frequencies(dtype)
        if self.settings["rope_type"] == "default":
            return frequency
        factor, low, high = (self.settings[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = self.settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (ramp + (1 - ramp) / factor)


class A2DQwen2LMHeadModel(DreamModel):
    """Under the published name."""

    config_class = A2DQwen2Config


class A2DQwen3LMHeadModel(DreamModel):
    """Under the published name."""

    config_class = A2DQwen3Config


class A2DLlamaLMHeadModel(DreamModel):
    """Under the published name."""

    config_class = A2DLlamaConfig


def register(model_class: type[DreamModel]) -> None:
    """Make transformers' Auto classes know a family. Not for qwen2, qwen3 and llama, which are transformers' own.

    Not as AutoModelForCausalLM, whatever the published auto_map says: a harness would score text left to right with
    a model that sees both sides, and the numbers would be nonsense without an error."""
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    for auto_class in (AutoModel, AutoModelForMaskedLM):
        auto_class.register(model_class.config_class, model_class)


for model_class in (DreamModel, A2DQwen2LMHeadModel, A2DQwen3LMHeadModel, A2DLlamaLMHeadModel):
    register(model_class)
