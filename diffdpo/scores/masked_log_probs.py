"""log p(target) at masked positions: the one forward that every score is made of, and the module engines wrap.

One call is one forward of the backbone. Rows are laid out without padding (see `models.layout`), the hidden states of
the scored positions alone reach the head (position - 1 for families with shifted logits), and the head never makes
a logits matrix above its budget. The module knows nothing of devices, ranks or sharding; whatever shards it sees
ordinary submodule calls.

Shapes: R rows, T padded length, N tokens in the stream, M scored positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu
from diffdpo.memory.host_copy import HostCopy
from diffdpo.memory.kept_outputs import keeping
from diffdpo.models.architecture.backbone import RowLayout, call_block, native
from diffdpo.models.architecture.compiled import AttentionOutside, call_compiled, check_compiler
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.architecture.token_log_probs import check_liger
from diffdpo.models.architecture.work import ModelWork
from diffdpo.optional import fault_of
from diffdpo.scores.block_log_probs import block_log_probs
from diffdpo.settings.model import ModelSettings

MAX_WASTE = 0.05
"""Share of padding a bucket of rows may hold before it is split: below it, fewer and larger attention calls win."""


@dataclass
class TokenCount:
    """Tokens run through a model so far, and how many of them were padding."""

    computed: int = 0
    padding: int = 0


class MaskedLogProbs(nn.Module):
    """Wraps a native model (or a peft model round one).

    `layer_checkpointing` recomputes each block in the backward (non-reentrant), from inputs that `offload` keeps on the
    host meanwhile; `keeps` names outputs that are not computed again (`memory.kept_outputs`). `logits_budget`: bytes of
    the largest logits chunk (default `token_log_probs.DEFAULT_LOGITS_BUDGET`). `max_waste`: padding allowed inside a
    length bucket; 1.0 is one padded batch. `use_liger`: the head through Liger's fused kernel, GPU only, after a check
    that it gives the same numbers; UserError where it cannot. `compile_blocks`: see `models.compiled`.
    `flex`: FlexAttention in a block-causal model; see `block_attention`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: FamilySpec,
        *,
        layer_checkpointing: bool = False,
        offload: bool = False,
        keeps: str = "nothing",
        logits_budget: int | None = None,
        max_waste: float = MAX_WASTE,
        use_liger: bool = False,
        compile_blocks: bool = False,
        flex: bool = False,
    ):
        super().__init__()
        if use_liger:
            if fault := fault_of("liger_kernel") if torch.cuda.is_available() else "there is none":
                raise UserError(
                    "--use_liger_kernel needs a GPU and liger-kernel: pip install liger-kernel, or leave it out "
                    f"({fault})"
                )
            check_liger("cuda", native(model).head.weight.dtype)
        if compile_blocks:
            check_compiler()
        self.use_liger, self.flex = use_liger, flex
        self.model = model
        self.spec = spec
        self.layer_checkpointing, self.offload, self.keeps = layer_checkpointing, offload, keeps
        self.logits_budget = logits_budget
        self.max_waste = max_waste
        self.call_block = call_compiled if compile_blocks else call_block
        self.counted = TokenCount()
        self.slices: Any = None  # an engine's, where rows lie on several processes (``engine.row_slices``)

    @classmethod
    def of(cls, model: nn.Module, spec: FamilySpec, settings: ModelSettings) -> "MaskedLogProbs":
        """The module that engines hold, as the flags would have its layers run."""
        return cls(
            model,
            spec,
            layer_checkpointing=settings.gradient_checkpointing,
            offload=settings.activation_offload == "cpu",
            keeps=settings.checkpoint_keeps,
            use_liger=settings.use_liger_kernel,
            compile_blocks=settings.torch_compile,
            flex=settings.flex,
        )

    @cached_property
    def work(self) -> ModelWork:
        """The work of the model as it is trained."""
        return ModelWork.of(self.model)

    def forward(
        self,
        input_ids_RT: Tensor,
        lengths_R: Tensor,
        row_M: Tensor,
        position_M: Tensor,
        target_M: Tensor,
        *clean: Tensor,
    ) -> Any:
        """Natural-log probabilities [M], fp32 (fp64 for an fp64 model), of `target_M` at (`row_M`, `position_M`).

        Tokens at or beyond a row's length are padding: never computed with, never attended to. With M = 0 the result
        is empty but part of the graph, so that collectives of a sharding engine run on every rank.

        A block-causal family takes the `clean` tokens of the rows' answers as well; see `block_log_probs`.
        """
        if self.spec.block_size:
            return block_log_probs(self, input_ids_RT, lengths_R, row_M, position_M, target_M, *clean)
        if self.spec.logit_shift and position_M.numel() and int(position_M.min()) < self.spec.logit_shift:
            raise ValueError(f"{self.spec.name} never predicts position 0: a scored token needs one before it")
        device, lengths = input_ids_RT.device, lengths_R.tolist()
        if self.slices is not None:
            inputs = (input_ids_RT, lengths_R, row_M, position_M, target_M)
            return self.slices.log_probs(self, inputs, self._max_waste(device))
        layout = Layout.packed(lengths, input_ids_RT.shape[1], device=device, max_waste=self._max_waste(device))
        self.counted.computed += len(layout)
        self.counted.padding += len(layout) - sum(lengths)
        keep_M = layout.offset_R[row_M] + position_M - self.spec.logit_shift
        hidden_MK = self.hidden_states(input_ids_RT.flatten()[layout.index_N], layout, keep_M)
        return self.log_probs(hidden_MK, target_M)

    def hidden_states(self, ids_N: Tensor, layout: RowLayout, keep_M: Tensor) -> Tensor:
        """Normed hidden states [M, K] of a stream, its blocks run as the options say."""
        run_block = self.call_block
        if self.layer_checkpointing and torch.is_grad_enabled():
            run_block = Checkpointed(self.call_block, offload=self.offload, keeps=self.keeps)
        seen = AttentionOutside(layout) if self.call_block is call_compiled else layout
        return native(self.model).hidden_states(ids_N, seen, keep_M=keep_M, run_block=run_block)

    def log_probs(self, hidden_MK: Tensor, target_M: Tensor) -> Tensor:
        """log p(target) [M] from the hidden states that predict them."""
        head = native(self.model).head
        return head(hidden_MK, target_M, logits_budget=self.logits_budget, use_liger=self.use_liger)

    def _max_waste(self, device: torch.device) -> float:
        return 0.0 if is_gpu(device) else self.max_waste  # varlen attention needs exact buckets


class Checkpointed:
    """Blocks of one forward, each run again in the backward. ``offload``: their inputs wait on the host; ``keeps``:
    what of them is not run again."""

    def __init__(self, call_block: Callable[..., Tensor], *, offload: bool, keeps: str):
        self.call_block, self.offload, self.how = call_block, offload, keeping(keeps)
        self.last: HostCopy | None = None

    def __call__(self, block: nn.Module, x_NK: Tensor, *args) -> Tensor:
        # ZeRO-3 releases frozen weights between forward and recomputation, which the default check takes for a
        # changed graph; blocks here are deterministic (no dropout), so nothing else needs checking.
        frozen = any(not p.requires_grad for p in block.parameters())
        check = "none" if frozen else "default"
        call = self._from_host(block, x_NK, *args) if self.offload else partial(self.call_block, block, x_NK, *args)
        return checkpoint(call, use_reentrant=False, preserve_rng_state=False, determinism_check=check, **self.how)

    def _from_host(self, block: nn.Module, x_NK: Tensor, *args) -> Callable[[], Tensor]:
        """The block's call: the first time of the tensor itself, then of the copy. The graph is that of the first."""
        self.last = copy = HostCopy(x_NK, self.last)
        given, needs_grad = [x_NK], x_NK.requires_grad

        def call() -> Tensor:
            x = given.pop() if given else copy.fetch().requires_grad_(needs_grad)
            return self.call_block(block, x, *args)

        return call
