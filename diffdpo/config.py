"""Settings of a training run, one dataclass a command, and what can be known wrong with them. No torch in here.

Each field is a flag of the same name (see ``flags.py``); its ``help`` is the flag's. ``None`` means "chosen for you":
what was chosen is printed and written to ``config.yaml``.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.names import source_names
from diffdpo.ds_config import read_ds_config
from diffdpo.errors import UserError
from diffdpo.models.adapter_folder import is_adapter


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a flag's help and, if given, its ``choices``."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``launch/train.py`` and ``launch/sft.py`` share: model, data, optimisation, engine, output, tracking."""

    model_name_or_path: str | None = setting(None, "policy to train: folder or hub name; default: the bundled model")
    train_data: str | None = setting(
        None, "shards (glob or URL), .jsonl(.gz), .json, .parquet, .csv, folder or data set; several with commas"
    )
    data_weights: str | None = setting(
        None, "shares of the sources of --train_data in an epoch, with commas, such as 3,1; default: each whole"
    )
    eval_data: str | None = setting(
        None, "the same for held-out data; default: a part of --train_data, split by prompt"
    )
    eval_fraction: float = setting(0.1, "share of the prompts held out when --eval_data is not given")
    data_cache_dir: str | None = setting(None, "where unsharded data is sharded once; default: beside --output_dir")
    max_length: int = setting(1024, "most tokens of prompt and answer together")
    max_prompt_length: int = setting(512, "most tokens of the prompt")
    truncation: str = setting(
        "keep_end", "what stays of a prompt that does not fit", choices=("keep_end", "keep_start", "drop")
    )
    answer_truncation: str = setting(
        "cut", "an answer that does not fit: cut, without terminator, or left out", choices=("cut", "drop")
    )
    template: str | None = setting(
        None,
        "chat: a string is a user's turn; auto: only messages are; default: chat where the tokenizer has a template",
        choices=("auto", "chat", "plain"),
    )
    shuffle_shards: int | None = setting(
        None, "shuffle over groups of so many shards; 0: over all; default: 8 for remote shards, else 0"
    )
    bucket_steps: int = setting(0, "bring records of like length together over so many steps; 0: do not")
    batching: str = setting(
        "equal", "micro-batches of a step: of one size, or of like numbers of tokens", choices=("equal", "balanced")
    )
    tail: str = setting("pad", "last step of an epoch: filled with empty slots, or left out", choices=("pad", "drop"))
    max_fault_fraction: float = setting(0.01, "stop when more of the records than this cannot be read")
    allow_damaged: bool = setting(False, "go on with what is left of shards that are cut or missing")
    strict: bool = setting(False, "stop at a record that cannot be read, instead of skipping and counting it")
    dataset_num_workers: int = setting(0, "processes that read and tokenise; 0: a thread of the training process")
    output_dir: str | None = setting(None, "default: outputs/<run_name>")
    run_name: str | None = setting(None, "default: the command and the time")
    experiment_name: str = setting("diffdpo", "MLflow experiment")
    tracking_uri: str | None = setting(
        None, "MLflow store; default: sqlite in the folder above --output_dir; 'none': off"
    )
    seed: int = setting(0, "same seed, same data order, same noise, same numbers")
    per_device_train_batch_size: int = setting(8, "records in a micro-batch of one process")
    per_device_eval_batch_size: int = setting(16, "records in a batch of one process in evaluation")
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step")
    max_steps: int = setting(-1, "optimizer steps; -1: --num_train_epochs decides")
    num_train_epochs: float = setting(1.0, "passes over the training data")
    learning_rate: float | None = setting(None, "peak; default: 5e-7, 5e-6 with --use_peft, 1e-4 for the bundled model")
    lr_scheduler_type: str = setting("cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = setting(10, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "AdamW's, on matrices only")
    adam_beta1: float = setting(0.9, "AdamW's beta1")
    adam_beta2: float = setting(0.95, "AdamW's beta2")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never")
    bf16: bool | None = setting(None, "bfloat16 weights; default: on a GPU that has it")
    gradient_checkpointing: bool = setting(False, "recompute each layer in the backward pass (saves memory)")
    torch_compile: bool = setting(False, "compile the layers: minutes at the start, then less time and memory")
    use_liger_kernel: bool = setting(False, "LM head through Liger's fused kernel (GPU; for trained heads)")
    score_estimator: str = setting("balanced", "how masks and weights are drawn; see docs/theory.md")
    num_mc_samples: int = setting(4, "forwards a score (n)")
    engine: str = setting("auto", "auto: deepspeed when --ds_config is given", choices=("auto", "deepspeed", "plain"))
    ds_config: str | None = setting(
        None, "DeepSpeed JSON: sharding and offload; the rest is filled in from these flags"
    )
    logging_steps: int = setting(1, "steps between lines of metrics.jsonl")
    eval_steps: int = setting(0, "steps between evaluations; 0: before and after only")
    save_steps: int = setting(0, "steps between checkpoints; 0: none but the final model")
    save_total_limit: int = setting(2, "newest checkpoints to keep")
    resume_from_checkpoint: str | None = setting(None, "a checkpoint folder, or 'latest' of --output_dir")
    max_eval_pairs: int = setting(256, "held-out records scored in an evaluation; 0: all")
    num_eval_problems: int = setting(200, "held-out problems answered by sampling, before and after; 0: none")
    eval_task: str = setting("auto", "who judges sampled answers", choices=("auto", "arithmetic", "gsm8k", "none"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Preference training (``launch/train.py``)."""

    ref_model_name_or_path: str | None = setting(None, "frozen reference; default: the policy as it starts")
    beta: float = setting(0.1, "strength of the pull towards the reference")
    loss_type: str = setting("sigmoid", "one loss, or several with commas; see docs/losses.md")
    loss_weights: str | None = setting(None, "one weight per loss, with commas; default: 1 each")
    label_smoothing: float = setting(0.0, "share of pairs assumed to be labelled the wrong way round")
    discopop_tau: float = setting(0.05, "temperature of the loss `discopop`")
    simpo_gamma: float = setting(0.5, "margin of the loss `simpo`")
    desirable_weight: float = setting(1.0, "weight of desirable answers in `kto` and `apo_zero_unpaired`")
    undesirable_weight: float = setting(1.0, "weight of undesirable answers in them")
    sft_weight: float = setting(0.0, "adds -sft_weight * score(chosen) / tokens(chosen)")
    target_stderr: float | None = setting(
        None, "choose n of each step, 2 to --num_mc_samples, for this standard error of a reward; see docs/training.md"
    )
    coefficient_rows: str = setting(
        "same",
        "rows the coefficient dL/dS of a score is taken from: the gradient's, other ones, all; see docs/training.md",
        choices=("same", "other", "all"),
    )
    num_coefficient_samples: int = setting(0, "further forwards a score for it, without a graph; 0: --num_mc_samples")
    num_diffusion_steps: int | None = setting(None, "T of the `trajectory` estimator")
    segmentation: str = setting(
        "auto", "how rows share memory", choices=("auto", "none", "checkpoint", "two_pass", "deferred")
    )
    segment_rows: int = setting(0, "rows in one forward; 0: by a number of tokens")
    max_memory: float = setting(
        0.0,
        "find segments and micro-batches that fit in this share of the device's memory by measuring; 0: do not; "
        "see docs/memory.md",
    )
    reference: str = setting(
        "auto",
        "where reference scores come from; see docs/training.md",
        choices=("auto", "copy", "adapter_off", "precomputed", "none"),
    )
    reference_cache: str | None = setting(
        None, "folder of precomputed reference scores; default: one per setting in the data cache"
    )
    precompute_only: bool = setting(False, "with --reference precomputed: make the scores and end")
    use_peft: bool = setting(False, "train a LoRA adapter instead of all weights")
    lora_r: int = setting(16, "rank of the adapter")
    lora_alpha: int = setting(32, "scale of the adapter")
    lora_target_modules: str | None = setting(
        None, "names in a block with commas, or a regular expression of full names; default: every linear layer"
    )
    use_dora: bool = setting(False, "DoRA: learn the size of each weight row apart from its direction")
    use_rslora: bool = setting(False, "rsLoRA: scale the adapter by lora_alpha / sqrt(lora_r)")
    load_in_4bit: bool = setting(False, "hold the frozen weights in NF4 (needs --use_peft)")
    num_generated_pairs: int = setting(1600, "training pairs generated when --train_data is not given")


@dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Supervised training with the masked-diffusion loss (``launch/sft.py``)."""

    model_name_or_path: str | None = setting(None, "model to go on from; default: a new one of the size below")
    learning_rate: float | None = setting(2e-3, "peak learning rate")
    per_device_train_batch_size: int = setting(64, "records in a micro-batch of one process")
    per_device_eval_batch_size: int = setting(64, "records in a batch of one process in evaluation")
    warmup_steps: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.05, "AdamW's, on matrices only")
    score_estimator: str = setting("mask_count", "how masks and weights are drawn; see docs/theory.md")
    num_mc_samples: int = setting(1, "masks drawn for an answer in a step (n)")
    eval_steps: int = setting(500, "steps between evaluations; 0: before and after only")
    answer_canvas: int = setting(0, "fill half of the answers up to so many tokens with terminators; 0: none")
    width: int = setting(128, "of a new model")
    layers: int = setting(4, "of a new model")
    heads: int = setting(4, "of a new model")
    vocab_size: int = setting(512, "most tokens of a new model's tokenizer, at least 259")
    num_generated_answers: int = setting(200_000, "training answers generated when --train_data is not given")
    answer_mix: str | None = setting(None, "their qualities, such as clear=0.6,vague=0.4; default: as data_pipeline's")


def make_config(config_class: type[RunConfig], values: Mapping[str, Any]) -> Any:
    """The checked dataclass; what can be known wrong without opening a model ends here."""
    config = config_class(**values)
    _check_numbers(config)
    _check_files(config)
    _check_data(config)
    if isinstance(config, TrainConfig):
        _check_train(config)
    return config


def _check_numbers(config: RunConfig) -> None:
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}; give a number")
    at_least = {
        1: ("max_length", "max_prompt_length", "per_device_train_batch_size", "per_device_eval_batch_size"),
        0: ("warmup_steps", "eval_steps", "save_steps", "seed", "max_eval_pairs", "num_eval_problems", "weight_decay"),
    }
    at_least[1] += ("gradient_accumulation_steps", "num_mc_samples", "logging_steps", "save_total_limit")
    at_least[1] += ("lora_r", "num_generated_pairs", "num_generated_answers", "width", "layers", "heads")
    at_least[0] += ("max_grad_norm", "dataset_num_workers", "learning_rate", "answer_canvas")
    for least, names in at_least.items():
        for name in names:
            value = getattr(config, name, None)  # some belong to one command only
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be in [0, 1)")
    for name in ("adam_epsilon", "lora_alpha"):
        if getattr(config, name, 1) <= 0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be above 0")
    if config.max_steps == 0 or config.max_steps < -1:
        raise UserError(f"--max_steps is {config.max_steps}; give 1 or more, or -1 to train --num_train_epochs")
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise UserError(
            f"--num_train_epochs is {config.num_train_epochs}; it must be above 0 when --max_steps is not set"
        )
    if not 0.0 <= config.eval_fraction < 1.0:
        raise UserError(f"--eval_fraction is {config.eval_fraction}; it must be in [0, 1)")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"--max_prompt_length {config.max_prompt_length} leaves no room for an answer in "
            f"--max_length {config.max_length}; make it smaller"
        )


def _check_files(config: RunConfig) -> None:
    for name, value in dataclasses.asdict(config).items():
        if value == "":
            raise UserError(f"--{name} is empty; give a value, or leave it out")
    if config.eval_data and not config.train_data:
        raise UserError(
            "--eval_data goes with --train_data; without that, both are generated: give it, or leave it out"
        )
    if config.run_name is not None and (not config.run_name.strip() or "/" in config.run_name):
        raise UserError(f"--run_name {config.run_name!r} names a folder; give a name without '/', or use --output_dir")
    policy = config.model_name_or_path
    if policy and is_adapter(policy):
        raise UserError(
            f"--model_name_or_path {policy} is a LoRA adapter; merge it first: "
            f"python launch/export.py --adapter {policy} --output FOLDER"
        )
    if config.engine == "deepspeed" and not config.ds_config:
        raise UserError("--engine deepspeed needs --ds_config, for instance --ds_config ds_configs/4080_offload.json")
    if config.engine == "plain" and config.ds_config:
        raise UserError("--engine plain does not read --ds_config; leave one of the two out")
    if config.ds_config:
        stage = read_ds_config(Path(config.ds_config)).get("zero_optimization", {}).get("stage", 0)
        if stage == 3 and config.torch_compile:
            raise UserError("--torch_compile has not been seen to work under ZeRO-3; leave it out, or use stage 2")
    for name in ("train_data", "eval_data"):
        for source in source_names(getattr(config, name) or ""):
            looks_local = "://" not in source and not any(c in source for c in "*?[{")
            if looks_local and Path(source).suffix and not Path(source).exists():
                raise UserError(f"--{name} {source}: no such file")
    if config.resume_from_checkpoint == "latest" and not config.output_dir:
        raise UserError("--resume_from_checkpoint latest needs --output_dir, the folder of the run to go on with")


def _check_data(config: RunConfig) -> None:
    for name in ("shuffle_shards", "bucket_steps"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be at least 0")
    if not 0.0 <= config.max_fault_fraction <= 1.0:
        raise UserError(f"--max_fault_fraction is {config.max_fault_fraction}; it must be in [0, 1]")
    if config.strict and config.allow_damaged:
        raise UserError("--strict stops at what --allow_damaged goes on without; leave one of the two out")
    weights = data_weights(config)
    if weights is None:
        return
    sources = len(source_names(config.train_data)) if config.train_data else 0
    if len(weights) != sources or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(
            f"--data_weights {config.data_weights}: give one number, at least 0, for each of the {sources} sources of "
            "--train_data, not all 0"
        )
    if config.shuffle_shards:
        raise UserError("--shuffle_shards is of no use with --data_weights, which mixes all of the data; leave one out")


def data_weights(config: RunConfig) -> list[float] | None:
    """``--data_weights`` as numbers."""
    if config.data_weights is None:
        return None
    try:
        return [float(weight) for weight in config.data_weights.split(",")]
    except ValueError:
        raise UserError(f"--data_weights {config.data_weights}: give numbers with commas, such as 3,1") from None


def _check_train(config: TrainConfig) -> None:
    if config.beta <= 0:
        raise UserError(f"--beta is {config.beta}; it must be above 0")
    if not 0.0 <= config.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing is {config.label_smoothing}; it must be in [0, 0.5)")
    if config.sft_weight < 0:
        raise UserError(f"--sft_weight is {config.sft_weight}; it must be at least 0")
    for name in ("desirable_weight", "undesirable_weight"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be at least 0")
    _check_target(config)
    _check_coefficient(config)
    if config.load_in_4bit and not config.use_peft:
        raise UserError("--load_in_4bit freezes the weights, so there is nothing to train; add --use_peft")
    if config.load_in_4bit and config.torch_compile:
        raise UserError("--torch_compile has not been seen to work with --load_in_4bit; leave one of the two out")
    if config.reference == "adapter_off" and not config.use_peft:
        raise UserError("--reference adapter_off needs --use_peft; without an adapter use --reference copy")
    if config.ref_model_name_or_path and config.reference not in ("auto", "copy", "precomputed"):
        raise UserError(f"--ref_model_name_or_path is not read under --reference {config.reference}; leave one out")
    if config.reference_cache and config.reference not in ("auto", "precomputed"):
        raise UserError(f"--reference_cache is not read under --reference {config.reference}; leave one of them out")
    if config.precompute_only and config.reference != "precomputed":
        raise UserError("--precompute_only makes what --reference precomputed reads; add --reference precomputed")
    _check_lora(config)
    if not 0.0 <= config.max_memory < 1.0:
        raise UserError(f"--max_memory is {config.max_memory}; give a share of the device's memory, 0 to below 1")
    if config.max_memory and config.segment_rows:
        raise UserError("--max_memory finds the size of segments, --segment_rows sets it; leave one out")
    if config.segment_rows < 0:
        raise UserError(f"--segment_rows is {config.segment_rows}; give 1 or more, or 0 to have it chosen")


def _check_target(config: TrainConfig) -> None:
    """--target_stderr varies n from step to step: not every setting lets it."""
    if config.target_stderr is None:
        return
    why = None
    if config.target_stderr <= 0:
        raise UserError(f"--target_stderr is {config.target_stderr}; it must be above 0")
    if config.num_mc_samples < 3:
        why = f"chooses n between 2 and --num_mc_samples, which is {config.num_mc_samples}; raise that"
    elif config.score_estimator == "exact":
        why = "has nothing to choose with --score_estimator exact, whose scores have no error; leave one out"
    elif config.score_estimator == "trajectory" and config.num_diffusion_steps is None:
        why = "would change the T of --score_estimator trajectory with n; give --num_diffusion_steps"
    elif config.reference == "precomputed":
        why = "does not know n beforehand, and --reference precomputed needs it; leave one out"
    if why:
        raise UserError(f"--target_stderr {why}")


def _check_coefficient(config: TrainConfig) -> None:
    """--coefficient_rows: not every setting has other rows."""
    if config.num_coefficient_samples < 0:
        raise UserError(f"--num_coefficient_samples is {config.num_coefficient_samples}; it must be at least 0")
    if config.coefficient_rows == "same":
        if config.num_coefficient_samples:
            raise UserError("--num_coefficient_samples is of no use with --coefficient_rows same; use other or all")
        return
    if config.score_estimator == "exact":
        raise UserError(
            f"--coefficient_rows {config.coefficient_rows}: --score_estimator exact has no other rows; use same"
        )
    if config.reference == "precomputed":
        raise UserError(
            f"--coefficient_rows {config.coefficient_rows}: --reference precomputed holds the gradient's rows alone; "
            "use --reference copy or adapter_off"
        )


def _check_lora(config: TrainConfig) -> None:
    for name in ("use_dora", "use_rslora", "lora_target_modules"):
        if getattr(config, name) and not config.use_peft:
            raise UserError(f"--{name} is about a LoRA adapter; add --use_peft")


def to_yaml(config: RunConfig) -> str:
    """The settings as a recipe that gives the same run, from its start even if it was resumed."""
    return yaml.safe_dump(dataclasses.asdict(config) | {"resume_from_checkpoint": None}, sort_keys=False)
