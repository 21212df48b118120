"""What the scorer and the sampler need of a model, whatever its family.

A family derives from `MaskedLM` and gives four things: `embed`, `blocks`, `final_norm`, `head`
(modules, called only through `__call__` so that sharding engines can gather their weights) and `rotary`.
A block is called as `block(x_NK, rope, layout, keep_M)`; see `MaskedLM.hidden_states`.

Shapes: R rows, T padded length, N tokens in the stream, M kept tokens, K hidden size, V vocabulary.
"""

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization, modeling_utils
from transformers.utils import ModelOutput

from diffdpo.errors import UserError
from diffdpo.models.architecture.layers import RMSNorm, RotaryTable, VocabularyHead
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.published_config import block_size_of
from diffdpo.models.checkpoint.adapter_folder import is_adapter
from diffdpo.models.checkpoint.weights import INDEX, SINGLE, read_model, stored_dtype

RunBlock = Callable[..., Tensor]
WITHOUT_EFFECT = {"trust_remote_code", "adapter_kwargs", "low_cpu_mem_usage"}
"""Arguments of `from_pretrained` that change nothing where a model is registered and no adapter is there."""


OFF = {"local_files_only", "force_download", "ignore_mismatched_sizes", "weights_only"}
"""Arguments that False switches off, as if they were not given. Any other may be a setting of the config."""


class RowLayout(Protocol):
    """What a backbone asks of a layout: rotary positions, their bound, and attention within rows."""

    @property
    def positions_N(self) -> Tensor: ...

    @property
    def max_length(self) -> int: ...

    def at(self, layer: int) -> "RowLayout":
        """As the layer of this number sees it: itself, but where keys and values of each layer are kept."""
        ...

    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor: ...


@dataclass
class MaskedLMOutput(ModelOutput):
    """`logits` [R, T, V] for the *output positions*: a shifted family's row i predicts token i + 1."""

    loss: Tensor | None = None
    logits: Tensor | None = None


def native(model: nn.Module) -> "MaskedLM":
    """The native model itself, or the one inside a peft wrapper (its adapters are in place and stay active)."""
    return cast(MaskedLM, model.get_base_model() if hasattr(model, "peft_config") else model)  # type: ignore[operator]


def call_block(block: nn.Module, *args) -> Tensor:
    return block(*args)


def mark_residual(*projections: nn.Linear) -> None:
    """These write to the residual stream: `initialise` starts them smaller."""
    for projection in projections:
        projection.writes_residual = True  # type: ignore[assignment]


def initialise(module: nn.Module, *, num_layers: int) -> None:
    """Random init: normal(0.02), the projections that write to the residual stream scaled by 1/sqrt(2 layers).

    `initialization` leaves alone what `from_pretrained` has already loaded.
    """
    if isinstance(module, nn.Linear):
        depth = 2 * num_layers if getattr(module, "writes_residual", False) else 1
        initialization.normal_(module.weight, std=0.02 / math.sqrt(depth))
        if module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        initialization.normal_(module.weight, std=0.02)
    elif isinstance(module, RMSNorm):
        initialization.ones_(module.weight)


def _resolved(dtype: str | torch.dtype, config, name_or_path: str) -> torch.dtype:
    """What "auto" means to transformers: config.json's dtype, else the one that is stored."""
    chosen = (config.dtype or stored_dtype(name_or_path)) if dtype == "auto" else dtype
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen


def _as_left_out(key: str, value: object) -> bool:
    return value is None or (value is False and key in OFF)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a file that was written again from one that was left; None where there is none."""
    status = path.stat() if path.is_file() else None
    return status and (status.st_ino, status.st_mtime_ns)


def refuse_partial(report: dict, name_or_path: str) -> None:
    """UserError when transformers reports tensors that were missing (and left random), unknown or misshapen."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = sorted(str(key) for key in report[what])
            raise UserError(f"{str(name_or_path)!r}: {len(names)} {what.replace('_', ' ')}, first {names[0]}")


class MaskedLM(PreTrainedModel):
    """The bidirectional forward over a token stream, and the padded `forward` users of transformers expect."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = False  # an option of MaskedLogProbs instead
    _supports_sdpa = True

    rotary: RotaryTable
    router_name: str | None = None
    """Of a mixture of experts: the last part of the name of its routers."""
    computes_on: torch.device | None = None
    """Where forwards run, for an engine that keeps the weights elsewhere."""

    @property
    def embed(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        raise NotImplementedError

    @property
    def head(self) -> VocabularyHead:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> VocabularyHead:
        return self.head

    @classmethod
    def from_pretrained(cls, name_or_path, *args, output_loading_info: bool = False, **kwargs):  # type: ignore[override]
        """As in transformers, but tensors that are missing, unknown or misshapen are an error, not a warning.

        Shards are streamed as by `load_model` where no more than a config and a dtype is given. What else there is
        (devices, quantisation, revisions) is transformers', which keeps every shard mapped until the last is read.
        """
        given = {key for key, value in kwargs.items() if not _as_left_out(key, value)} - WITHOUT_EFFECT
        if not (args or output_loading_info or given - {"config", "dtype", "torch_dtype"} or is_adapter(name_or_path)):
            config = copy.deepcopy(kwargs.get("config")) or cast(Any, cls.config_class).from_pretrained(name_or_path)
            dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
            return read_model(cls, config, str(name_or_path), dtype=_resolved(dtype, config, str(name_or_path)))
        loaded = super().from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
        model, report = cast(tuple[MaskedLM, dict], loaded)
        refuse_partial(report, name_or_path)
        return (model, report) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in transformers, but config.json keeps the checkpoint's `architectures`, and `auto_map` leads to its code.

        A local checkpoint's Python files (those `auto_map` names import others) and generation defaults are copied
        along; for one of the hub they are named by repository. They are never run here. Weights that the folder held
        before are replaced, whatever their number of shards; UserError where it holds an adapter.
        """
        folder, published, main = Path(save_directory), self.config.architectures, kwargs.get("is_main_process", True)
        if is_adapter(folder):
            raise UserError(f"{str(folder)!r} holds an adapter, which would hide the model: name another folder")
        before = {name: _stamp(folder / name) for name in (INDEX, SINGLE)}
        with _unwrapped():
            super().save_pretrained(save_directory, *args, **kwargs)
        if not main:
            return
        for name in before:  # once the new weights are there, what this save did not write is the old model's
            if before[name] is not None and _stamp(folder / name) == before[name]:
                (folder / name).unlink()
        self.config.architectures = published or self.config.architectures
        name = str(self.name_or_path or "")
        source = Path(name)
        if name and source.is_dir() and source.resolve() != folder.resolve():
            own_code = source.glob("*.py") if getattr(self.config, "auto_map", None) else ()
            for file in (*own_code, *source.glob("generation_config.json")):
                shutil.copy(file, folder)
        elif name.count("/") == 1 and not source.exists():
            self.config.auto_map = _named_by_repository(self.config, name)
        self.config.save_pretrained(save_directory)

    def hidden_states(
        self, ids_N: Tensor, layout: RowLayout, *, keep_M: Tensor | None = None, run_block: RunBlock = call_block
    ) -> Tensor:
        """Normed last hidden states [N, K], or [M, K] at the stream positions `keep_M`.

        Only attention of the last block needs every token, so its MLP, the norm and the head run on the kept tokens.
        `run_block(block, *args)` is how the caller puts an activation checkpoint round each block.
        """
        x_NK = self.embed(ids_N)
        rope = self.rotary(layout.positions_N, layout.max_length, x_NK.dtype)
        *earlier, last = self.blocks
        for layer, block in enumerate(earlier):
            x_NK = run_block(block, x_NK, rope, layout.at(layer), None)
        return self.final_norm(run_block(last, x_NK, rope, layout.at(len(earlier)), keep_M))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **unused
    ) -> MaskedLMOutput:
        """Logits of a right padded batch; of a block-causal family each token sees its own block and those before it.

        `attention_mask` [R, T]: 1 for real tokens, a prefix of each row. Other arguments of transformers' models may be
        given where they ask for nothing (None, False).
        """
        rows, length = input_ids.shape
        for name, value in unused.items():
            if value is not None and value is not (name == "return_dict"):
                raise TypeError(
                    f"{type(self).__name__} takes no {name}: input_ids and attention_mask alone make logits"
                )
        if labels is not None:
            raise NotImplementedError("a masked diffusion loss needs noise: score with diffdpo.scores.MaskedLogProbs")
        lengths = [length] * rows
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                shapes = f"{list(attention_mask.shape)}, input_ids {list(input_ids.shape)}"
                raise ValueError(f"attention_mask has shape {shapes}; they must be the same (right padding)")
            lengths = attention_mask.sum(-1).tolist()
            prefix = torch.arange(length, device=input_ids.device) < attention_mask.sum(-1, keepdim=True)
            if not torch.equal(prefix, attention_mask.bool()):
                raise ValueError("attention_mask must mark a prefix of every row (right padding)")
        block_size = block_size_of(self.config)
        layout = Layout.padded(lengths, length, device=input_ids.device, block_size=block_size)
        hidden = self.hidden_states(input_ids.flatten(), layout)
        return MaskedLMOutput(logits=self.head(hidden).unflatten(0, (rows, length)))


@contextmanager
def _unwrapped() -> Iterator[None]:
    """transformers' save takes a model out of what an engine may have put round it, and imports DeepSpeed (and MLflow
    with it: seconds) to know what that could be. An engine here holds the model inside a module of its own."""
    taken_out = modeling_utils.unwrap_model
    modeling_utils.unwrap_model = lambda model, *_, **__: model
    try:
        yield
    finally:
        modeling_utils.unwrap_model = taken_out


def _named_by_repository(config, repository: str) -> dict[str, str] | None:
    auto_map = getattr(config, "auto_map", None)
    return auto_map and {key: name if "--" in name else f"{repository}--{name}" for key, name in auto_map.items()}
