"""LLaDA2.0 and 2.1: block diffusion with a mixture of experts, in the published (unmerged) layout.

Attention has one fused projection (queries, keys, values in that order), norms on q and k, and rotary positions on a
part of each head. The first layers are dense; in the others a sigmoid router with a selection bias picks experts
within the best groups, and a shared expert sees every token. Routers stay frozen under `requires_grad_(True)` unless
they are asked for: `router.py`.

How experts are run: `experts.py`. Not here: merged checkpoints (`llada2_moe_veomni`), biases.

Shapes: N tokens, K hidden size, E experts, T experts of a token, H heads, G key/value heads, D head size.
"""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from diffdpo.models.architecture.backbone import MaskedLM, RowLayout, initialise, mark_residual
from diffdpo.models.architecture.dream import OPTIONAL, SUPPORTED, DreamConfig, DreamModel, GatedMLP, register
from diffdpo.models.architecture.experts import mix_experts
from diffdpo.models.architecture.layers import RMSNorm, RotaryTable, VocabularyHead, rotate
from diffdpo.models.architecture.published_config import Setting
from diffdpo.models.architecture.router import Router

COUNTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "num_shared_experts")
PUBLISHED_BLOCK = 32


class LLaDA2MoeConfig(DreamConfig):
    """The published `config.json`. It does not say `block_size`; every published model has blocks of 32."""

    model_type = "llada2_moe"
    supported: ClassVar[dict[str, tuple]] = SUPPORTED | {
        "score_function": ("sigmoid", None),
        "norm_topk_prob": (True, None),
        "moe_router_enable_expert_bias": (True, None),
        "use_qk_norm": (True, None),
        "use_bias": (False, None),
        "use_qkv_bias": (False, None),
        "norm_head": (False, None),
        "embedding_dropout": (0.0, None),
        "output_dropout": (0.0, None),
    }
    own_keys: ClassVar[frozenset[str]] = frozenset({"num_experts", "partial_rotary_factor"})
    optional_keys: ClassVar[frozenset[str]] = frozenset({*OPTIONAL, *supported, "block_size", "first_k_dense_replace"})
    rotary_types: ClassVar[tuple[str, ...]] = ("default",)
    qkv_bias_default: ClassVar[bool] = False
    least_block: ClassVar[int | None] = 1

    num_experts: Setting = None
    num_experts_per_tok: Setting = None
    moe_intermediate_size: Setting = None
    n_group: Setting = None
    topk_group: Setting = None
    num_shared_experts: Setting = None
    routed_scaling_factor: Setting = None
    partial_rotary_factor: Setting = None
    first_k_dense_replace: int = 0
    block_size: int | None = PUBLISHED_BLOCK

    def check(self) -> "LLaDA2MoeConfig":
        """As of the family it derives from, and what experts need."""
        super().check()
        self.require({**dict.fromkeys(COUNTS, int), "routed_scaling_factor": float, "partial_rotary_factor": float}, {})
        experts, groups, size = self.num_experts, self.n_group, self.rotary_size
        chosen = self.topk_group * experts // groups
        self.refuse(
            [
                (experts % groups, f"has num_experts={experts}, not a multiple of n_group={groups}"),
                (experts // groups < 2, f"has n_group={groups}: groups are judged by their two best experts"),
                (self.topk_group > groups, f"has topk_group={self.topk_group} of n_group={groups}"),
                (
                    self.num_experts_per_tok > chosen,
                    f"has num_experts_per_tok={self.num_experts_per_tok}, but {self.topk_group} groups hold {chosen}",
                ),
                (
                    type(self.first_k_dense_replace) is not int or self.first_k_dense_replace < 0,
                    f"has first_k_dense_replace={self.first_k_dense_replace!r}; expected: a whole number from 0",
                ),
                (
                    size % 2 or not 0 < size <= self.head_size,
                    f"rotates {size} of {self.head_size} dimensions of a head",
                ),
            ]
        )
        return self

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_size * self.partial_rotary_factor)


class FusedAttention(nn.Module):
    """Grouped-query attention with one projection for queries, keys and values."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.head_size, self.rotary_size = config.head_size, config.rotary_size
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        wide = config.num_attention_heads * self.head_size
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * self.head_size, bias=False)
        self.query_layernorm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.dense = nn.Linear(wide, config.hidden_size, bias=False)
        mark_residual(self.dense)

    def forward(self, h_NK: Tensor, rope: tuple[Tensor, Tensor], layout: RowLayout, keep_M: Tensor | None) -> Tensor:
        q_NHD, k_NGD, v_NGD = self.query_key_value(h_NK).unflatten(-1, (-1, self.head_size)).split(self.heads, dim=1)
        q_NHD, k_NGD = self._rotated(self.query_layernorm(q_NHD), rope), self._rotated(self.key_layernorm(k_NGD), rope)
        mixed_NK = layout.attend(q_NHD, k_NGD, v_NGD)
        return self.dense(mixed_NK if keep_M is None else mixed_NK[keep_M])

    def _rotated(self, x_NHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        turned, rest = x_NHD.split([self.rotary_size, self.head_size - self.rotary_size], dim=-1)
        return torch.cat([rotate(turned, *rope, full_precision=False), rest], dim=-1)


class Expert(GatedMLP):
    """An MLP of another width."""

    def __init__(self, size: int, width: int):
        nn.Module.__init__(self)
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        mark_residual(self.down_proj)


class ExpertsMLP(nn.Module):
    """Σ over a token's experts of weight · expert(h), and the shared expert."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        size, width = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(Expert(size, width) for _ in range(config.num_experts))
        self.gate = Router(
            experts=config.num_experts,
            size=size,
            groups=config.n_group,
            best_groups=config.topk_group,
            experts_of_token=config.num_experts_per_tok,
            scale=config.routed_scaling_factor,
        )
        self.shared_experts = Expert(size, width * config.num_shared_experts)

    def forward(self, h_NK: Tensor) -> Tensor:
        expert_NT, weight_NT = self.gate(h_NK)
        return self.shared_experts(h_NK) + mix_experts(h_NK, self.experts, expert_NT, weight_NT)


class LLaDA2MoeDecoderLayer(nn.Module):
    """Pre-norm: x + attention(norm x), then x + mlp(norm x); dense before `first_k_dense_replace`, then experts."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int):
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = FusedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Expert(config.hidden_size, config.intermediate_size) if dense else ExpertsMLP(config)

    def forward(self, x_NK: Tensor, rope: tuple[Tensor, Tensor], layout: RowLayout, keep_M: Tensor | None) -> Tensor:
        mixed_NK = self.attention(self.input_layernorm(x_NK), rope, layout, keep_M)
        x_NK = (x_NK if keep_M is None else x_NK[keep_M]) + mixed_NK
        return x_NK + self.mlp(self.post_attention_layernorm(x_NK))


class LLaDA2MoeModel(nn.Module):
    """Holds the `model.*` names of the published checkpoints."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LLaDA2MoeModelLM(DreamModel):
    """LLaDA2.x with its LM head, under the published name."""

    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012 - as transformers declares it
    router_name = "gate"
    trains_router = False

    def __init__(self, config: LLaDA2MoeConfig):
        MaskedLM.__init__(self, config.check())
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}
        self.model = LLaDA2MoeModel(config)  # type: ignore[assignment]
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.rotary = RotaryTable(config.rotary_size, config.rotary["rope_theta"])
        self.post_init()
        self.requires_grad_(True)

    @property
    def embed(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.word_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.word_embeddings = cast(nn.Embedding, value)

    def requires_grad_(self, requires_grad: bool = True) -> "LLaDA2MoeModelLM":
        """As of any module, but routers stay frozen unless they are trained too; their selection bias always does."""
        super().requires_grad_(requires_grad)
        for module in self.modules():
            if isinstance(module, Router):
                module.weight.requires_grad = requires_grad and self.trains_router
                module.expert_bias.requires_grad = False
        return self

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, num_layers=self.config.num_hidden_layers)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.02) if not getattr(
                module.weight, "_is_hf_initialized", False
            ) else None


register(LLaDA2MoeModelLM)
