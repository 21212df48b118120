"""What TRL's and transformers' names for settings come to here, for flags and recipes alike. No torch, no TRL.

``SAME`` are names that mean the same here. ``TABLE`` holds the others: each is read as a setting of ours, or accepted
where its value asks for what is done here anyway, or answered in one line: what to use instead, or why it makes no
sense here. ``python -m diffdpo.cli.trl`` prints docs/from_trl.md. The names are those of transformers 5.23
(TrainingArguments) and TRL 1.16 (DPO, KTO, CPO, ORPO and SFT configurations, ModelConfig, ScriptArguments), and those
of the same classes back to transformers 4.46 and TRL 0.9, which recipes still have.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffdpo.errors import UserError
from diffdpo.losses.preference import DEFAULTS

Given = Mapping[str, Any]
Read = Callable[[str, Any, Given], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A name of theirs. ``kind``: the heading in the table; ``here``: what it is here; ``read(name, value, beside)``:
    our settings, where ``beside`` is all that is given, or UserError."""

    kind: str
    here: str
    read: Read


READ, ONLY, ANSWERED = "read", "only", "answered"


def translated(given: Given, beside: Given) -> dict[str, Any]:
    """Our settings from those names in ``given`` that are theirs. UserError for one that has no place here, and where
    two names set the same thing differently."""
    ours: dict[str, Any] = {}
    by: dict[str, str] = {}
    for name in given:
        if name not in TABLE or given[name] is None:
            continue
        for setting, value in TABLE[name].read(name, given[name], beside).items():
            other = setting if setting in given else by.get(setting)
            if other and word(given[other] if other == setting else ours[setting]) != word(value):
                raise UserError(f"--{name} means --{setting} {word(value)}, which --{other} sets too; leave one out")
            ours[setting], by[setting] = value, name
    return ours


def word(value: Any) -> str:
    """A value as one would write it: lists with commas, true and false."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(word, value))
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


# -------------------------------------------------------------------------------------------------- kinds of entries


def renamed(ours: str) -> Entry:
    """A setting of ours under another name."""
    return Entry(READ, f"`--{ours}`", lambda name, value, beside: {ours: value})


def words(here: str, **meaning: dict[str, Any]) -> Entry:
    """Values that mean settings of ours."""

    def read(name: str, value: Any, beside: Given) -> dict[str, Any]:
        if word(value).lower() not in meaning:
            raise UserError(f"--{name} is {word(value)!r}; allowed: {', '.join(meaning)}")
        return meaning[word(value).lower()]

    return Entry(READ, here, read)


def only(*values: str, why: str) -> Entry:
    """Accepted with these values, which ask for what is done here anyway."""

    def read(name: str, value: Any, beside: Given) -> dict[str, Any]:
        if not any(_alike(word(value), accepted) for accepted in values):
            raise UserError(f"--{name} {word(value)}: {why}")
        return {}

    return Entry(ONLY, f"{', '.join(f'`{value}`' if value else 'empty' for value in values)}: {why}", read)


def _alike(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one.lower() == other.lower()


def answered(text: str) -> Entry:
    """No setting here: what to use, or why there is none."""

    def read(name: str, value: Any, beside: Given) -> dict[str, Any]:
        raise UserError(f"--{name}: {text}")

    return Entry(ANSWERED, text, read)


def custom(here: str) -> Callable[[Read], Entry]:
    """A decorator: read by a function of its own."""
    return lambda read: Entry(READ, here, read)


# ---------------------------------------------------------------------------------------- entries of their own


def strategy(*settings: str) -> Entry:
    """When to evaluate, or to save: no (all settings 0), by steps (the first of them), or every epoch."""
    steps, none = settings[0], " ".join(f"--{setting} 0" for setting in settings)

    @custom(f"no: `{none}`; steps: `--{steps}`; epoch: `--{steps}` as the share of an epoch")
    def entry(name: str, value: Any, beside: Given) -> dict[str, Any]:
        kind = "no" if value is False else word(value).lower()  # YAML 1.1 takes `no` for false
        if kind == "no":
            return dict.fromkeys(settings, 0)
        if kind == "steps":
            if beside.get(steps) is None:
                raise UserError(f"--{name} steps needs --{steps}, a number or a share such as 0.1")
            return {}
        if kind == "epoch":
            return {steps: _epoch_share(name, steps, beside)}
        raise UserError(f"--{name} is {word(value)!r}; allowed: no, steps, epoch")

    return entry


def _epoch_share(name: str, steps: str, beside: Given) -> float:
    try:
        epochs, limit = float(beside.get("num_train_epochs") or 1.0), float(beside.get("max_steps") or -1)
    except (TypeError, ValueError):
        return 0  # no numbers, which is told when they are read
    if limit > 0:
        raise UserError(f"--{name} epoch does not go with --max_steps, which sets no epochs; use --{steps}")
    return 1 / epochs if epochs > 1 else 0  # before and after, and the final model, there always is


@custom("`--train_data NAME`, with `--dataset_train_split S` `--train_data NAME:S`")
def _dataset_name(name: str, value: Any, beside: Given) -> dict[str, Any]:
    return {"train_data": _with_split(name, value, beside.get("dataset_train_split"))}


def _split(ours: str) -> Entry:
    @custom(f"with `--dataset_name NAME`: `--{ours} NAME:SPLIT`")
    def entry(name: str, value: Any, beside: Given) -> dict[str, Any]:
        source = beside.get("dataset_name")
        if source is None:
            raise UserError(f"--{name} goes with --dataset_name; here write --{ours} NAME:SPLIT")
        return {ours: _with_split(name, source, value)}

    return entry


def _with_split(name: str, source: Any, split: Any) -> str:
    if not isinstance(source, str):
        raise UserError(f"--{name} {word(source)}: one name; for several use --train_data A B")
    if split is None:
        return source
    if "[" in str(split) or "+" in str(split):
        raise UserError(
            f"--{name}: {split!r} is a part or a sum of splits; name a whole split, or a file of the records"
        )
    return f"{source}:{split}"


@custom('`{"use_reentrant": false}`: layers are never recomputed in another way')
def _checkpointing_kwargs(name: str, value: Any, beside: Given) -> dict[str, Any]:
    try:
        asked = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        asked = None
    if asked not in ({}, {"use_reentrant": False}):
        raise UserError(
            f'--{name} {word(value)}: layers are recomputed with {{"use_reentrant": false}} and in no other way'
        )
    return {}


@custom("the path of a JSON: `--ds_config`")
def _deepspeed(name: str, value: Any, beside: Given) -> dict[str, Any]:
    if not isinstance(value, str):
        raise UserError(f"--{name}: write the configuration to a JSON file and name that as --ds_config")
    return {"ds_config": value}


# ------------------------------------------------------------------------------------------------------ the tables

SAME = (
    *("output_dir", "run_name", "seed", "num_train_epochs", "max_steps", "resume_from_checkpoint"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim"),
    *("bf16", "gradient_checkpointing", "torch_compile", "use_liger_kernel", "attn_implementation"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("early_stopping_patience", "early_stopping_threshold"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
    *("model_name_or_path", "model_revision", "adapter_name_or_path", "load_in_4bit"),
    *("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_dora", "use_rslora"),
    *("max_length", "max_prompt_length"),
    *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "ld_alpha"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("beta", "loss_type", "loss_weights", *DEFAULTS),  # the losses' own parameters have TRL's names
)
"""Names that are flags here with the same meaning. (Defaults differ: see --help_all.)"""

_ONE_SCRIPT = "`diffdpo train` trains and scores held-out data before and after"
_METRICS = "there are no metrics of one's own; held-out data are scored as --help_all's group evaluation says"
_READER = "records are read ahead by --dataset_num_workers processes, in an order that the seed alone sets"
_MEMORY = "--gradient_checkpointing, --segmentation and --max_memory save memory; see docs/memory.md"
_IDS = "the model's family and tokenizer say which tokens these are"
_TRACKIO = "runs are recorded by MLflow; see --tracking_uri and --experiment_name"
_GRADIENTS = "there is no DistributedDataParallel: the engine sums gradients itself"
_FSDP = "use --engine fsdp2 under torchrun; it has --fsdp_cpu_offload and --fsdp_reshard_after_forward"
_ONE_MODEL = "a model is named by --model_name_or_path and --model_revision, and read with --bf16 or --load_in_4bit"
_PACKED = "an answer is scored under its own prompt; --batching balanced and --bucket_steps lessen padding"
_LOGGED = "metrics.jsonl is always written; see --logging_steps"
_TPU = "TPUs are not offered; a run uses CUDA GPUs or CPUs"
_MATCHING = "BCO's density ratios of prompts are not offered; --loss_type bco_pair does without"

TABLE: dict[str, Entry] = {
    # TRL's ScriptArguments and data sets
    "dataset_name": _dataset_name,
    "dataset_train_split": _split("train_data"),
    "dataset_test_split": _split("eval_data"),
    "dataset_config": answered("save that configuration's records to a file or a folder, and name it as --train_data"),
    "dataset_streaming": only("false", why="data are sharded once and then read as a stream; see docs/data.md"),
    "datasets": answered("use --train_data A B with --data_weights 3 1"),
    "streaming": only("false", why="data are sharded once and then read as a stream; see docs/data.md"),
    "test_split_size": renamed("eval_fraction"),
    "ignore_bias_buffers": only("false", why=_GRADIENTS),
    "gradient_checkpointing_use_reentrant": only("false", why="layers are recomputed without re-entrant autograd"),
    "sanity_check": only("false", why="use --max_steps and --max_eval_pairs for a short run"),
    # TRL's ModelConfig
    "dtype": words(
        "bfloat16: `--bf16 true`; float32: `--bf16 false`; auto: as the device has it",
        bfloat16={"bf16": True},
        float32={"bf16": False},
        auto={},
    ),
    "torch_dtype": words(
        "as `dtype`",
        bfloat16={"bf16": True},
        float32={"bf16": False},
        auto={},
    ),
    "trust_remote_code": only("false", why="no code of a model's is ever run, and none is needed; see docs/models.md"),
    "lora_dropout": only(
        "0", why="with dropout policy and reference would not be the same numbers where their weights are the same"
    ),
    "lora_target_parameters": answered("only linear modules are adapted; see --lora_target_modules"),
    "lora_task_type": only("CAUSAL_LM", why="adapters are those of a language model"),
    "load_in_8bit": only("false", why="use --load_in_4bit (NF4)"),
    "bnb_4bit_quant_type": only("nf4", why="--load_in_4bit is NF4"),
    "use_bnb_nested_quant": only("true", why="--load_in_4bit quantises its scales as well"),
    "bnb_4bit_quant_storage": answered("4-bit weights are held as bytes"),
    # TRL's DPOConfig
    "ref_model": renamed("ref_model_name_or_path"),
    "reference_free": words("true: `--reference none`", true={"reference": "none"}, false={}),
    "precompute_ref_log_probs": words(
        "true: `--reference precomputed`", true={"reference": "precomputed"}, false={}
    ),
    "precompute_ref_batch_size": answered("scores are made in batches of --per_device_train_batch_size"),
    "rpo_alpha": renamed("sft_weight"),
    "truncation_mode": renamed("truncation"),
    "dataset_num_proc": answered("records are turned into tokens as they are read; use --dataset_num_workers"),
    "max_completion_length": answered("an answer may have what its prompt leaves of --max_length"),
    "max_target_length": answered("an answer may have what its prompt leaves of --max_length"),
    "model_init_kwargs": answered(_ONE_MODEL),
    "ref_model_init_kwargs": answered(_ONE_MODEL),
    "model_adapter_name": answered("name its folder as --adapter_name_or_path; as it starts it is the reference"),
    "ref_adapter_name": answered("the adapter as it starts, or another by its folder as --ref_model_name_or_path"),
    "force_use_ref_model": answered("use --reference copy"),
    "base_model_attribute_name": answered("use --use_liger_kernel, which finds the model by itself"),
    "router_aux_loss_coef": only(
        "0", why="no loss of balance is added; with --train_router the balance is reported"
    ),
    "disable_dropout": only(
        "true", why="with dropout policy and reference would not be the same numbers where their weights are the same"
    ),
    "padding_free": only("true", why="rows are laid out by like lengths, or without padding on a GPU, always"),
    "pad_to_multiple_of": answered("rows are not padded to a multiple"),
    "padding_value": answered(_IDS),
    "label_pad_token_id": answered(_IDS),
    "pad_token": answered(_IDS),
    "eos_token": answered(_IDS),
    "activation_offloading": words(
        "`true`: `--activation_offload cpu`", true={"activation_offload": "cpu"}, false={"activation_offload": "none"}
    ),
    "generate_during_eval": answered("answers are sampled before and after: --num_eval_problems and --eval_task"),
    "is_encoder_decoder": only("false", why="a masked diffusion model has no decoder of its own"),
    "tools": answered("put them into the prompt's messages"),
    "use_logits_to_keep": only("true", why="the head sees positions that are scored, and no others"),
    "use_liger_loss": answered("use --use_liger_kernel"),
    # TRL's KTOConfig, of old
    "prompt_sample_size": answered(_MATCHING),
    "min_density_ratio": answered(_MATCHING),
    "max_density_ratio": answered(_MATCHING),
    # TRL's CPOConfig and ORPOConfig
    "cpo_alpha": renamed("sft_weight"),
    "alpha": answered("AlphaPO's loss is not offered; --loss_type simpo is its case of 0"),
    # TRL's SFTConfig
    "max_seq_length": renamed("max_length"),
    "use_liger": renamed("use_liger_kernel"),
    "dataset_batch_size": answered("records are turned into tokens one by one, as they are read"),
    "num_of_sequences": answered(_PACKED),
    "chars_per_token": answered(_PACKED),
    "chat_template_path": answered("the tokenizer's chat template is used; --template says when"),
    "dataset_text_field": answered("a record has a prompt and an answer; see docs/data.md for the names of columns"),
    "dataset_kwargs": answered("records are turned into tokens as they are read; see the group data of --help_all"),
    "shuffle_dataset": only("true", why=_READER),
    "packing": only("false", why=_PACKED),
    "packing_strategy": answered(_PACKED),
    "eval_packing": only("false", why=_PACKED),
    "completion_only_loss": only("true", why="prompts are never masked, so answers alone are scored"),
    "assistant_only_loss": only("false", why="the last answer is scored; the turns before it are its prompt"),
    # transformers: what is run
    "do_train": only("true", why=_ONE_SCRIPT),
    "do_eval": only("true", why=f"{_ONE_SCRIPT}; --eval_fraction 0 holds none out"),
    "do_predict": only("false", why="`diffdpo generate` and `diffdpo score` are commands of their own"),
    "overwrite_output_dir": only("false", why="a folder that holds a run is never overwritten; name another"),
    "local_rank": Entry(READ, "given by launchers; the environment decides", lambda name, value, beside: {}),
    "use_cpu": only("false", why="hide the GPUs: set CUDA_VISIBLE_DEVICES to nothing"),
    "no_cuda": only("false", why="hide the GPUs: set CUDA_VISIBLE_DEVICES to nothing"),
    "use_mps_device": only("false", why="Apple's GPUs are not offered; a run uses CUDA GPUs or CPUs"),
    "tpu_num_cores": answered(_TPU),
    "tpu_metrics_debug": only("false", why=_TPU),
    "full_determinism": only("false", why="the same seed gives the same data and noise always; see docs/training.md"),
    "data_seed": answered("--seed is that of data and noise both"),
    "debug": only("", "none", why="a loss or gradient that is not finite ends the run with its step"),
    # transformers: optimisation
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "adafactor": words("true: `--optim adafactor`", true={"optim": "adafactor"}, false={}),
    "use_ipex": only("false", why="torch's own kernels are used; --torch_compile compiles the layers"),
    "jit_mode_eval": only("false", why="--torch_compile compiles the layers, for evaluations too"),
    "torchdynamo": answered("use --torch_compile"),
    "fp16_backend": only("auto", why="weights are bf16 with --bf16, else fp32"),
    "fp16_opt_level": answered("fp16 and its loss scaling are not offered; use --bf16"),
    "warmup_ratio": renamed("warmup_steps"),
    "optim_args": answered("see --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay"),
    "optim_target_modules": answered("GaLore and APOLLO are not offered; --use_peft trains few parameters"),
    "label_smoothing_factor": only("0", why="--label_smoothing is that of preference losses"),
    "average_tokens_across_devices": only("true", why="a loss is divided by the count over all processes, always"),
    "neftune_noise_alpha": answered("noise on embeddings would make policy and reference differ from the start"),
    "fp16": only("false", why="fp16 and its loss scaling are not offered; use --bf16"),
    "half_precision_backend": only("auto", why="weights are bf16 with --bf16, else fp32"),
    "bf16_full_eval": answered("evaluations run on the weights as they are trained; see --bf16"),
    "fp16_full_eval": only("false", why="evaluations run on the weights as they are trained; see --bf16"),
    "tf32": only("false", why="fp32 products stay fp32; --bf16 is faster still"),
    "activation_checkpointing": renamed("gradient_checkpointing"),
    "activation_checkpointing_kwargs": _checkpointing_kwargs,
    "gradient_checkpointing_kwargs": _checkpointing_kwargs,
    "torch_compile_backend": only("inductor", why="--torch_compile uses inductor"),
    "torch_compile_mode": only("default", why="--torch_compile uses the default mode"),
    "liger_kernel_config": answered("--use_liger_kernel is the head's fused kernel, without options"),
    "use_cache": only("false", why="attention is bidirectional: training has no keys to keep"),
    "torch_empty_cache_steps": answered(_MEMORY),
    "auto_find_batch_size": only("false", why="use --max_memory 0.9, which measures what fits"),
    # transformers: logging
    "logging_strategy": only("steps", why=_LOGGED),
    "logging_first_step": only("false", why="the evaluation before training is written at step 0; see --logging_steps"),
    "logging_dir": answered("metrics.jsonl lies in --output_dir; MLflow's store is --tracking_uri"),
    "logging_nan_inf_filter": only("false", why="a loss that is not finite ends the run, and is not hidden"),
    "log_on_each_node": only("false", why="one process writes"),
    "log_level": only("passive", "warning", "info", why="a run says little; metrics.jsonl has the rest"),
    "log_level_replica": only("passive", "warning", why="one process speaks"),
    "disable_tqdm": only("false", why="the bar is drawn on stderr; send that elsewhere"),
    "include_num_input_tokens_seen": only("no", "false", why="tokens_per_second is in metrics.jsonl"),
    "include_tokens_per_second": only("true", why="tokens_per_second is in metrics.jsonl"),
    "skip_memory_metrics": answered("peak_memory_gib is in metrics.jsonl always; it costs nothing"),
    "project": renamed("experiment_name"),
    "trackio_space_id": answered(_TRACKIO),
    "trackio_bucket_id": answered(_TRACKIO),
    "trackio_static_space_id": answered(_TRACKIO),
    # transformers: evaluation and checkpoints
    "eval_strategy": strategy("eval_steps"),
    "evaluation_strategy": strategy("eval_steps"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "use_legacy_prediction_loop": only("false", why=_METRICS),
    "past_index": only("-1", why="a row is scored by itself, and keeps no state for the next"),
    "ray_scope": answered("a search over settings is `diffdpo sweep`"),
    "eval_delay": only("0", why="there is an evaluation before training; --eval_steps sets those in between"),
    "eval_on_start": only("true", why="there is an evaluation before training; --eval_fraction 0 holds none out"),
    "eval_do_concat_batches": answered(_METRICS),
    "eval_use_gather_object": answered(_METRICS),
    "eval_accumulation_steps": answered("evaluations keep sums, no predictions"),
    "prediction_loss_only": answered(_METRICS),
    "include_for_metrics": answered(_METRICS),
    "include_inputs_for_metrics": answered(_METRICS),
    "batch_eval_metrics": answered(_METRICS),
    "save_strategy": strategy("save_steps", "save_minutes"),
    "save_only_model": only("false", why="a checkpoint is what a run goes on from; final/ holds the model alone"),
    "save_on_each_node": only("false", why="one process writes"),
    "save_safetensors": only("true", why="weights are written as safetensors"),
    "enable_jit_checkpoint": only("true", why="SIGTERM always ends a run with a checkpoint"),
    "ignore_data_skip": only("false", why="a resumed run goes on at the record where it stopped"),
    "restore_callback_states_from_checkpoint": only("false", why="callbacks have no state here"),
    # transformers: the hub
    "hub_strategy": only("end", why="the final model is pushed, once"),
    "hub_always_push": only("false", why="the final model is pushed, once"),
    "hub_revision": answered("the final model is pushed to the main branch"),
    "push_to_hub_model_id": renamed("hub_model_id"),
    "push_to_hub_token": renamed("hub_token"),
    "push_to_hub_organization": answered("use --hub_model_id ORGANIZATION/NAME"),
    # transformers: data
    "dataloader_num_workers": renamed("dataset_num_workers"),
    "dataloader_drop_last": words(
        "true: `--tail drop`; false: `--tail pad`", true={"tail": "drop"}, false={"tail": "pad"}
    ),
    "dataloader_pin_memory": answered(_READER),
    "dataloader_persistent_workers": answered(_READER),
    "dataloader_prefetch_factor": answered(_READER),
    "dataloader_multiprocessing_context": answered(_READER),
    "dataloader_in_order": only("true", why=_READER),
    "remove_unused_columns": only("true", "false", why="columns that are not asked for are not read"),
    "label_names": answered("a record's columns are recognised by their names; see docs/data.md"),
    "train_sampling_strategy": only(
        "random", why="--bucket_steps 16 brings like lengths together, --batching balanced evens out micro-batches"
    ),
    "dispatch_batches": only("false", why="each process reads its own records"),
    "split_batches": only(
        "false", why="--per_device_train_batch_size is of one process; --global_batch_size is divided by them"
    ),
    "group_by_length": only("false", why="use --bucket_steps 16"),
    "length_column_name": answered("lengths are counted here; see --bucket_steps"),
    # transformers: engines
    "deepspeed": _deepspeed,
    "fsdp": only("", "false", "none", why=_FSDP),
    "fsdp_config": answered(_FSDP),
    "fsdp_min_num_params": only("0", why=_FSDP),
    "fsdp_transformer_layer_cls_to_wrap": answered("--engine fsdp2 finds the layers of a model by itself"),
    "mp_parameters": only("", why="models are cut by --ds_config or --engine fsdp2, and in no other way"),
    "accelerator_config": answered("the engine is --engine, and what shards is in --ds_config"),
    "parallelism_config": answered("data are parallel and --ds_config shards; nothing else is split"),
    "ddp_find_unused_parameters": answered(_GRADIENTS),
    "ddp_bucket_cap_mb": answered(_GRADIENTS),
    "ddp_broadcast_buffers": answered(_GRADIENTS),
    "ddp_static_graph": answered(_GRADIENTS),
    "ddp_backend": answered("NCCL on GPUs, gloo on CPUs"),
    "ddp_timeout": answered("a process that waits in vain is told by --hang_timeout"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the page

HEADINGS = {
    READ: "Read as a setting of ours",
    ONLY: "Accepted where it asks for what is done here anyway",
    ANSWERED: "Answered in one line (exit code 2)",
}


def page() -> str:
    """docs/from_trl.md."""
    parts = [
        "# From TRL and transformers",
        "",
        *_wrapped(
            "Made from the parser's own tables by `python -m diffdpo.cli.trl > docs/from_trl.md`; a test holds them "
            "together. Flags and YAML recipes are read alike, `--a-flag` as `--a_flag`, lists with blanks or commas, "
            "and steps below 1 as a share of all steps (`--warmup_steps 0.1`). Names are those of TRL 0.9 to 1.16 "
            "and transformers 4.46 to 5.23. Defaults are this project's: see `--help_all`; where a "
            "loss of the same name differs, [losses.md](losses.md) says so."
        ),
        "",
        "## The same name, the same meaning",
        "",
        *_wrapped(", ".join(f"`{name}`" for name in SAME) + "."),
    ]
    for kind, heading in HEADINGS.items():
        rows = [f"| `{name}` | {entry.here} |" for name, entry in sorted(TABLE.items()) if entry.kind == kind]
        parts += ["", f"## {heading}", "", "| theirs | here |", "|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 118, break_long_words=False)


if __name__ == "__main__":
    print(page(), end="")
