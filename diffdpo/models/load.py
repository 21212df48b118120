"""From a checkpoint directory or hub id to a native model, its tokenizer and its family's spec; and back.

Remote code is never run: the family is chosen by `model_type`. Weights are streamed shard by shard (`stream`).
"""

import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data_pipeline.errors import DataError
from data_pipeline.hub import at_revision
from data_pipeline.tokenizer import first_id, name_mask, read_tokenizer
from diffdpo.errors import UserError
from diffdpo.gpus import KINDS
from diffdpo.models.architecture.block_families import (
    Fast_dLLM_QwenForCausalLM,
    FastDLLMQwenConfig,
    SDARConfig,
    SDARForCausalLM,
)
from diffdpo.models.architecture.dream import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
    DreamConfig,
    DreamModel,
    LlamaDiffusionConfig,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
)
from diffdpo.models.architecture.illada import ILLaDAConfig, ILLaDAForCausalLM
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
from diffdpo.models.architecture.published_config import BLOCK_KEYS, block_size_of, context_of
from diffdpo.models.architecture.spec import DECODER_LORA_TARGETS, LLADA2_LORA_TARGETS, LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter, block_size_of_adapter, check_base, is_adapter
from diffdpo.models.checkpoint.model_folder import write_model
from diffdpo.models.checkpoint.weights import Shards, only_kept, read_model

log = logging.getLogger(__name__)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
STOP_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")
"""End-of-turn tokens of the chat templates in use; they end an answer when sampling, beside the terminator."""


def dtype_name(bf16: bool) -> str:
    """The name of the dtype that a run's weights have."""
    return "bfloat16" if bf16 else "float32"


@dataclass(frozen=True)
class Family:
    """What reading a checkpoint of one `model_type` takes.

    `mask_token`, `mask_token_id`: name and id of the published mask, for checkpoints that declare none.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    lora_targets: str
    logit_shift: int
    mask_token: str | None = None
    mask_token_id: int | None = None


FAMILIES = {
    "llada": Family(LLaDAConfig, LLaDAModelLM, LLADA_LORA_TARGETS, 0),
    "illada": Family(ILLaDAConfig, ILLaDAForCausalLM, DECODER_LORA_TARGETS, 0, "<[MASK]>", 5),
    "sdar": Family(SDARConfig, SDARForCausalLM, DECODER_LORA_TARGETS, 0, "<|MASK|>", 151669),
    "Fast_dLLM_Qwen": Family(
        FastDLLMQwenConfig, Fast_dLLM_QwenForCausalLM, DECODER_LORA_TARGETS, 1, "|<MASK>|", 151665
    ),
    "llada2_moe": Family(LLaDA2MoeConfig, LLaDA2MoeModelLM, LLADA2_LORA_TARGETS, 0, "<|mask|>", 156895),
    "Dream": Family(DreamConfig, DreamModel, DECODER_LORA_TARGETS, 1),
    "qwen2": Family(Qwen2DiffusionConfig, DreamModel, DECODER_LORA_TARGETS, 1),
    "qwen3": Family(Qwen3DiffusionConfig, DreamModel, DECODER_LORA_TARGETS, 1),
    "llama": Family(LlamaDiffusionConfig, DreamModel, DECODER_LORA_TARGETS, 1),
    "a2d-qwen2": Family(A2DQwen2Config, A2DQwen2LMHeadModel, DECODER_LORA_TARGETS, 0),
    "a2d-qwen3": Family(A2DQwen3Config, A2DQwen3LMHeadModel, DECODER_LORA_TARGETS, 0),
    "a2d-llama": Family(A2DLlamaConfig, A2DLlamaLMHeadModel, DECODER_LORA_TARGETS, 0),
}


NOT_BUILT = {
    "llada2_moe_veomni": "LLaDA2.x with merged experts: load the published layout, model_type llada2_moe",
    "sdar_moe": "SDAR with experts: its router (softmax) and layout are not built",
    "lladamoe": "LLaDA-MoE: its router and layout are not built",
    "nemotron_labs_diffusion": (
        "Nemotron-Labs-Diffusion: its clean tokens attend causally, one by one, where those of block families here see "
        "their whole block; that, its names (encoder.*, diffusion_head) and YaRN with query scaling are not built"
    ),
    "diffusion_gemma": "DiffusionGemma: uniform noise without a mask token is another kind of diffusion",
}
"""Families that are known and refused, and why."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score or sample, with what belongs to it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: FamilySpec

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The name of what it computes in: that of the embedding, which is never in 4 bits and has no adapter."""
        first = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(name for name, dtype in DTYPES.items() if dtype == first)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    load_in_4bit: bool = False,
    block_size: int | None = None,
    shards: Shards | None = None,
) -> LoadedModel:
    """Load a published checkpoint (NAME or NAME@REVISION of the hub), a directory written by `save_model`, or a peft
    adapter directory with its base.

    `block_size`: for a checkpoint that does not say how many tokens a block has (0: its attention is full).
    `shards`: an engine's, where each process reads its part of the weights only; `device` is then for the adapter.
    `load_in_4bit`: NF4 with double quantisation for the blocks; embedding, norms and head stay in `dtype`.
    Raises UserError for anything a user can mend: an unknown family or dtype, missing keys or tensors, a tokenizer
    that does not fit.
    """
    name_or_path = str(name_or_path)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    check_device(device)
    if is_adapter(name_or_path):
        options: dict[str, Any] = {"dtype": dtype, "device": device, "load_in_4bit": load_in_4bit}
        return load_adapter(name_or_path, **options, block_size=block_size, shards=shards)
    family, config = read_config(name_or_path, block_size=block_size)
    tokenizer = load_tokenizer(name_or_path)
    spec = make_spec(config, family, tokenizer)
    weights = {"dtype": DTYPES[dtype], "device": device, "nf4": load_in_4bit}
    model = read_model(family.model_class, config, name_or_path, **weights, shards=shards)
    return LoadedModel(model, tokenizer, spec)


def check_device(device: str) -> None:
    """UserError for a device torch does not know or that is not here."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device {device!r} is unknown; use cpu, cuda, cuda:0, ...") from error
    if kind not in ("cpu", *KINDS):
        raise UserError(f"device {device!r} is not supported; use cpu, cuda, cuda:0, ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: no GPU is to be found here; use cpu")


def load_with_adapter(name_or_path: str | None, adapter: str | None, **options) -> LoadedModel:
    """`load_model` of a name (None: the bundled model, or the base that the adapter names), with an adapter's folder
    on it where one is given. UserError for a base with other weights than the adapter was trained on."""
    if adapter is None:
        return load_model(model_or_bundled(name_or_path), **options)
    if name_or_path:
        check_base(adapter, name_or_path)
    return load_adapter(adapter, base=name_or_path, **options)


def load_adapter(folder: str | Path, *, base: str | None = None, **options) -> LoadedModel:
    """The model of an adapter folder: its base (or `base`, where that has moved) with the adapter on it.

    `options` are those of `load_model`.
    """
    base = base or base_of_adapter(folder)
    options["block_size"] = block_size_of_adapter(folder, options.get("block_size"))
    if is_adapter(base):
        raise UserError(f"{base!r}, the base of the adapter {str(folder)!r}, is an adapter itself: merge it first")
    loaded = load_model(base, **options)
    from diffdpo.models.lora.adapters import attach_adapter  # peft takes seconds to import

    return LoadedModel(attach_adapter(loaded.model, folder), loaded.tokenizer, loaded.spec)


def read_config(name_or_path: str, *, block_size: int | None = None) -> tuple[Family, PreTrainedConfig]:
    """The family and checked config of a checkpoint; no weights are read. `block_size` as for `load_model`."""
    only_kept(name_or_path)  # in the words of this package when it is nowhere
    name, where = at_revision(name_or_path)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, **where)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: JSON that is no object
        raise UserError(f"no model config at {name_or_path!r}: {_first_line(error)}") from error
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"no model config at {name_or_path!r}: give a directory with config.json or a hub id")
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in NOT_BUILT:
        raise UserError(f"{name_or_path!r} has model_type {kind!r}, which is refused. {NOT_BUILT[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{name_or_path!r} has model_type {kind!r}; supported: {', '.join(FAMILIES)} (docs/models.md adds a family)"
        )
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{name_or_path!r} holds weights quantised by {method}: load the original; load_in_4bit quantises it here"
        )
    return FAMILIES[kind], made_config(FAMILIES[kind], raw, name_or_path, block_size=block_size)


def made_config(family: Family, raw: dict[str, Any], name: str, *, block_size: int | None = None) -> Any:
    """The checked config of a published ``config.json``. UserError for a value that transformers cannot take."""
    if block_size is not None:
        _set_block_size(raw, family, block_size)
    for key in ("dtype", "torch_dtype"):  # some write the dtype as torch prints it
        if isinstance(raw.get(key), str):
            raw[key] = raw[key].removeprefix("torch.")
    try:
        config = cast(Any, family.config_class).from_dict(raw)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name!r}: config.json cannot be used: {_first_line(error)}") from error
    return config.check()


def _set_block_size(raw: dict[str, Any], family: Family, block_size: int) -> None:
    """Put what the user says where config.json says nothing. UserError where it says otherwise, or it cannot be."""
    config_class = cast(Any, family.config_class)
    if config_class.least_block is None:
        raise UserError(f"--block_size {block_size}: models of type {raw['model_type']!r} have no blocks; leave it out")
    key = config_class.attribute_map.get("block_size", "block_size")
    for name in (key, *BLOCK_KEYS - {key}):
        if raw.get(name) not in (None, block_size):
            raise UserError(
                f"--block_size {block_size}: config.json has {name}={raw[name]!r}; leave it out, or correct one"
            )
    raw[key] = block_size


def model_context(name_or_path: str, *, block_size: int | None = None) -> int | None:
    """Tokens that the model was made for, as its config says."""
    if is_adapter(name_or_path):
        base = base_of_adapter(name_or_path)
        return model_context(base, block_size=block_size_of_adapter(name_or_path, block_size))
    return context_of(read_config(name_or_path, block_size=block_size)[1])


def empty_model(name_or_path: str, *, block_size: int | None = None) -> PreTrainedModel:
    """The model on the meta device: its modules and shapes; no weights are read."""
    family, config = read_config(name_or_path, block_size=block_size)
    with torch.device("meta"):
        return family.model_class(config)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer without remote code, as the data commands read it."""
    try:
        return read_tokenizer(name_or_path)
    except DataError as error:
        raise UserError(str(error)) from error


def load_tokenizer_and_spec(
    name_or_path: str, *, block_size: int | None = None
) -> tuple[PreTrainedTokenizerBase, FamilySpec]:
    """What `load_model` gives besides the model, without reading weights."""
    if is_adapter(name_or_path):
        base = base_of_adapter(name_or_path)
        return load_tokenizer_and_spec(base, block_size=block_size_of_adapter(name_or_path, block_size))
    family, config = read_config(name_or_path, block_size=block_size)
    tokenizer = load_tokenizer(name_or_path)
    return tokenizer, make_spec(config, family, tokenizer)


def make_spec(config: PreTrainedConfig, family: Family, tokenizer: PreTrainedTokenizerBase) -> FamilySpec:
    """The spec of one checkpoint: ids from its config, else from its tokenizer, which then learns the mask's name.

    `logit_shift` in config.json overrides the family's (a model made from an autoregressive one and trained unshifted).
    """
    mask = first_id(config.mask_token_id, tokenizer.mask_token_id)
    mask = _published_mask(family, tokenizer) if mask is None else mask
    terminator = first_id(config.eos_token_id, tokenizer.eos_token_id)
    rows = getattr(config, "embedding_size", config.vocab_size)
    if mask is None:
        raise UserError("neither config.json nor the tokenizer has a mask token: add mask_token_id to config.json")
    if terminator is None:
        raise UserError("neither config.json nor the tokenizer has an end token: add eos_token_id to config.json")
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the embedding {rows} rows: "
            "call model.resize_token_embeddings and save the model first"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [terminator]
    if mask >= rows:
        raise UserError(f"the mask token {mask} is no row of the embedding, which has {rows}: set mask_token_id")
    if mask in ends:
        raise UserError(f"mask_token_id and eos_token_id are both {mask}: they must differ")
    check_ids(config, tokenizer)
    declared = mask in (config.mask_token_id, tokenizer.mask_token_id)
    if declared or _is_a_sign(tokenizer, mask):
        name_mask(tokenizer, mask)
    vocabulary = tokenizer.get_vocab()
    stops = dict.fromkeys((*ends, *(vocabulary[token] for token in STOP_TOKENS if token in vocabulary)))
    shift = getattr(config, "logit_shift", None)
    return FamilySpec(
        name=config.model_type,
        mask_token_id=mask,
        terminator_id=terminator,
        pad_token_id=cast(int, first_id(config.pad_token_id, tokenizer.pad_token_id, terminator)),
        block_class=next(iter(family.model_class._no_split_modules or ())),
        lora_targets=family.lora_targets,
        logit_shift=family.logit_shift if shift is None else shift,
        template="chat" if tokenizer.chat_template else "plain",
        stop_token_ids=tuple(stop for stop in stops if stop != terminator),
        block_size=block_size_of(config),
    )


def _published_mask(family: Family, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The mask of a family whose checkpoints declare none: the token of its name, else the published id."""
    named = tokenizer.get_vocab().get(family.mask_token) if family.mask_token else None
    published = family.mask_token_id
    if named is None and published is not None and published < len(tokenizer) and not _is_a_sign(tokenizer, published):
        _tell_of_text(published, str(tokenizer.convert_ids_to_tokens(published)))
    return published if named is None else named


@cache
def _tell_of_text(mask: int, text: str) -> None:
    """Once a process: a checkpoint is asked for its mask several times."""
    log.warning(
        f"neither config.json nor the tokenizer names a mask token; {mask}, the published one, is taken, which is "
        f"{text!r} in this tokenizer: if texts are written with it, add the right mask_token_id to config.json"
    )


def _is_a_sign(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is no ordinary text, which must not be cut out of words by being made a special token."""
    text = str(tokenizer.convert_ids_to_tokens(token)) if token < len(tokenizer) else ""
    return token in tokenizer.added_tokens_decoder or bool(re.fullmatch(r"[<\[|].+[>\]|]", text))


def check_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError where config.json and the tokenizer name different masks, or config.json an end that is ordinary text.

    Two different ends among the added tokens are a habit of published chat models (end of text, end of turn).
    """
    mask, ends = config.mask_token_id, config.eos_token_id
    if None not in (mask, tokenizer.mask_token_id) and mask != tokenizer.mask_token_id:
        raise UserError(
            f"config.json has mask_token_id {mask} and the tokenizer's mask token {tokenizer.mask_token!r} is "
            f"{tokenizer.mask_token_id}: they must be the same; correct the one that is wrong"
        )
    listed = ends if isinstance(ends, list) else [ends]
    known = {None, tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    if tokenizer.eos_token_id not in (None, *listed) and not known.issuperset(listed):
        raise UserError(
            f"config.json has eos_token_id {ends}, ordinary text, and the tokenizer's end token "
            f"{tokenizer.eos_token!r} is {tokenizer.eos_token_id}: correct the one that is wrong"
        )


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: str | Path, **options) -> None:
    """Write config, safetensors and tokenizer in the published layout. For a peft model: adapter and tokenizer.

    `options` are transformers' (`max_shard_size`). UserError for 4-bit weights, which the published code cannot read,
    and for an adapter where a model is or a model where an adapter is: one of them would never be read again.
    """
    if hasattr(model, "peft_config") and (Path(directory) / "config.json").is_file():
        raise UserError(f"{str(directory)!r} holds a model, which the adapter would hide: name another folder")
    if getattr(model, "is_loaded_in_4bit", False) and not hasattr(model, "peft_config"):
        raise UserError("4-bit weights are not written: save the original model, or an adapter on it")
    write_model(model, tokenizer, Path(directory), **options)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
