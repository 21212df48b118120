"""The DeepSpeed JSON of ``--ds_config``: read, checked, and completed with what the flags say. No torch in here."""

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.sharding import sharding_of
from diffdpo.errors import UserError
from diffdpo.shipped import find_shipped

KNOWN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "data_types"),
    *("checkpoint", "aio", "comms_logger", "communication_data_type"),
    *("flops_profiler", "csv_monitor", "tensorboard", "wandb", "comet", "dump_state", "disable_allgather"),
    *("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"),
    *("managed_gradient_accumulation", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"),
    *("seq_parallel_communication_data_type", "nebula"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("dataloader_drop_last", "disable_python_gc", "graph_harvesting", "timers"),
)
"""Names at the top of DeepSpeed's JSON that are understood. DeepSpeed itself passes over any other without a word."""

OTHER_TRAINING = (
    *("amp", "torch_autocast", "compression_training", "elasticity", "autotuning", "curriculum_learning"),
    *("data_efficiency", "progressive_layer_drop", "eigenvalue", "sparse_attention", "sparse_gradients", "compile"),
    *("hybrid_engine", "pipeline", "weight_quantization", "tensor_parallel", "use_data_before_expert_parallelism"),
)
"""Sections that would change what is trained or how the loop must call the engine."""

ACCELERATE = (
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path"),
    *("offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_config_file"),
    *("deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_config", "distributed_type", "mixed_precision"),
)
"""Names of accelerate's configuration, which is another file."""

OBJECTS = (
    *(("zero_optimization",), ("optimizer",), ("bf16",), ("fp16",), ("optimizer", "params")),
    *(("zero_optimization", "offload_optimizer"), ("zero_optimization", "offload_param")),
    *(("data_types",), ("checkpoint",), ("aio",), ("comms_logger",), ("timers",)),
    *(("flops_profiler",), ("csv_monitor",), ("tensorboard",), ("wandb",), ("comet",), ("nebula",)),
)
BOOLEANS = (  # DeepSpeed takes any text for true, "false" too
    *("prescale_gradients", "dump_state", "disable_allgather", "memory_breakdown", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "dataloader_drop_last", "disable_python_gc"),
    "graph_harvesting",
)
INTEGERS = ("steps_per_print",)
AIO = {"block_size": int, "queue_depth": int, "intra_op_parallelism": int} | dict.fromkeys(
    ("single_submit", "overlap_events", "use_gds"), bool
)
SECRET = re.compile("api_?key|passw|secret|credential|token$", re.IGNORECASE)
OF_ADAM = {"adam_w_mode": True, "adamw_mode": True, "bias_correction": True, "amsgrad": False}
"""Parameters that would make another optimizer of AdamW, with the values that do not."""
TO_ADAM = ("lr", "betas", "eps", "weight_decay", "torch_adam", "fp32_optimizer_states", *OF_ADAM)


def read_ds_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON of ``--ds_config``: a file, or a shipped one's name. UserError for what cannot be meant."""
    path = find_shipped("ds_configs", str(path), flag="--ds_config")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_said_once, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError, IsADirectoryError) as error:  # json's and Unicode's errors are ValueErrors
        raise UserError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object, found {type(content).__name__}")
    faults = chain(_secrets(content), _faults_of_names(content), _faults_of_values(content))
    fault = next(faults, None)  # the later trust the earlier
    if fault:
        raise UserError(f"--ds_config {path}{fault}")
    return content


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python keeps the last of two equal names in silence."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return dict(pairs)


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no finite number")


def _finite(text: str) -> float:
    """Python takes what is too large for infinity in silence."""
    return number if math.isfinite(number := float(text)) else _no_number(text)


def _secrets(content: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The JSON stands in the run's folder and in MLflow."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{place}{key}.")
        elif value and SECRET.search(key):
            yield (
                f" has {place}{key}, a secret that every record of the run would hold; leave it out and give it in the "
                "environment (as COMET_API_KEY, WANDB_API_KEY)"
            )


def _faults_of_names(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key in OTHER_TRAINING and value not in ({}, None, False) and _enabled(value):
            yield f" sets {key}, which would change what is trained or how; leave it out of the JSON"
        if key in ACCELERATE:
            yield (
                f" sets {key!r}, a name of accelerate's configuration; a DeepSpeed JSON says "
                '{"zero_optimization": {"stage": 2, ...}} (see ds_configs/)'
            )
        if key == "seed":
            yield " sets seed, which DeepSpeed does not read; give --seed and leave it out of the JSON"
        if key == "activation_checkpointing":
            yield (
                f" sets {key}, which DeepSpeed does only where a model calls it, and none here does; give "
                "--gradient_checkpointing and leave it out of the JSON"
            )
        if key not in (*KNOWN, *OTHER_TRAINING):
            meant = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.8)
            yield f" sets {key!r}, which DeepSpeed does not know; " + (
                f"{meant[0]!r} is meant?" if meant else "remove it"
            )
    if content.get("scheduler"):
        yield " sets a scheduler; --lr_scheduler_type and --warmup_steps set the rate, so leave it out of the JSON"


def _enabled(section: Any) -> bool:
    return not isinstance(section, Mapping) or section.get("enabled", True) is not False


def _faults_of_values(content: Mapping[str, Any]) -> Iterator[str]:
    for keys in OBJECTS:
        found: Any = content
        for key in keys:
            found = found.get(key, {}) if isinstance(found, Mapping) else {}
        if not isinstance(found, Mapping):
            yield f": {'.'.join(keys)} must be an object, found {found!r}"
    for key in (*BOOLEANS, *INTEGERS):
        kind = bool if key in BOOLEANS else int
        if type(value := content.get(key, True if kind is bool else 1)) is not kind or (kind is int and value < 1):
            yield f": {key} is {value!r}; write {'true or false' if kind is bool else 'a whole number above 0'}"
    yield from _faults_of_optimizer(content.get("optimizer", {}))
    for where, enabled in _switches(content):
        if enabled != "auto" and not isinstance(enabled, bool):  # DeepSpeed takes any text for true, "false" too
            yield f': {where} is {enabled!r}; write true, false or "auto"'
    if more := next((key for key, value in content.get("bf16", {}).items() if key != "enabled" and value), None):
        yield f": bf16 has {more!r}; --bf16 says how weights and gradients are kept, so leave it out"
    for key, value in content.get("aio", {}).items():
        if key not in AIO:
            yield f": aio has {key!r}, which DeepSpeed does not read; allowed: {', '.join(AIO)}"
        elif type(value) is not (kind := AIO[key]) or (kind is int and value < 1):
            yield f": aio.{key} is {value!r}; write {'true or false' if kind is bool else 'a whole number above 0'}"
    factor = content.get("gradient_predivide_factor", 1)
    if type(factor) not in (int, float) or factor <= 0:
        yield f": gradient_predivide_factor is {factor!r}; write a number above 0"
    if (norm := (content.get("zero_optimization") or {}).get("compute_grad_norm", True)) is not True:
        yield f": compute_grad_norm is {norm!r}, and a run records and checks the gradient's norm; leave it out"
    zero = content.get("zero_optimization") or {}
    yield from _faults_of_unmet(content, zero)
    if old := next(
        (key for key in ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory") if key in zero), ""
    ):
        yield f': zero_optimization.{old} is an old name; write "offload_optimizer": {{"device": "cpu"}}'
    kind = content.get("data_types", {}).get("grad_accum_dtype", "auto")
    if kind not in ("auto", None, "fp32", "bf16"):
        yield f": data_types.grad_accum_dtype is {kind!r}; allowed: fp32, bf16"
    stage = zero.get("stage", 0)
    if stage in (1, 2) and zero.get("offload_param", {}).get("device", "none") != "none":
        yield f": zero_optimization.offload_param moves weights out of stage 3 alone, and the stage is {stage}"
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield f": zero_optimization.stage is {stage!r}; allowed: 1, 2, 3"
    elif stage == 0:
        # DeepSpeed's stage 0 keeps no norm of the gradient and, in bf16, takes a wrong first step
        yield (
            ": zero_optimization.stage is 0 (or not there), which shards nothing; give 1, 2 or 3, or leave "
            "--ds_config out for the plain engine, which is the same without DeepSpeed"
        )


def _faults_of_unmet(content: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed would meet too late: its checkpoints could not be read, or the first step ends in an assertion."""
    if found := content.get("checkpoint", {}).get("load_universal"):
        yield (
            f": checkpoint.load_universal is {found!r}; any engine and number of processes reads a checkpoint here, so "
            "leave it out"
        )
    for key in ("elastic_checkpoint", "zenflow", "super_offload"):
        if zero.get(key):
            yield f": zero_optimization.{key} is not supported; leave it out"
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            yield f": zero_optimization.{part}.device is {device!r}; allowed: none, cpu, nvme"
    if zero.get("zero_hpz_partition_size", 1) != 1 and zero.get("stage") != 3:
        yield f": zero_hpz_partition_size cuts weights, which stage {zero.get('stage')} does not; use stage 3"


def _switches(content: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all that is switched on or off."""
    for key, value in content.items():
        if key == "enabled":
            yield f"{place}{key}", value
        elif isinstance(value, Mapping):
            yield from _switches(value, f"{place}{key}.")


def _faults_of_optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    params = optimizer.get("params", {})
    for keys, allowed, where in ((optimizer, ("type", "params"), "optimizer"), (params, TO_ADAM, "optimizer.params")):
        if unknown := next((key for key in keys if key not in allowed), None):
            yield f": {where} has {unknown!r}; allowed: {', '.join(allowed)}"
    for key, value in params.items():
        if key in OF_ADAM and value not in (OF_ADAM[key], "auto"):
            yield f": optimizer.params.{key} is {value!r}, which makes another optimizer of AdamW; leave it out"
        if key in ("torch_adam", "fp32_optimizer_states") and not isinstance(value, bool):
            yield f": optimizer.params.{key} is {value!r}; write true or false"


def complete_ds_config(
    ds_config: Mapping[str, Any],
    options: OptimizerOptions,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    bf16: bool,
    cuda: bool,
) -> dict[str, Any]:
    """The user's sharding and offload with batch sizes, clipping, precision and AdamW filled in.

    A value that is there and contradicts ours is a UserError; ``"auto"`` means ours.
    """
    config = copy.deepcopy(dict(ds_config))
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "gradient_clipping": options.max_grad_norm,
    }
    for key, value in ours.items():
        if not _agrees(given := config.get(key, "auto"), value):
            raise UserError(f"--ds_config sets {key} to {given!r}, the flags to {value}; leave it out of the JSON")
        config[key] = value
    if config.get("fp16", {}).get("enabled") is True:
        raise UserError("--ds_config enables fp16, whose loss scaling is not supported; use --bf16 or fp32")
    if bf16 and not sharding_of(config).any:
        raise UserError("--bf16 needs ZeRO stage 1 or more (under stage 0 DeepSpeed's first step is wrong)")
    config["bf16"] = {"enabled": bf16}
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for part in ("offload_optimizer", "offload_param"):
        if not cuda and "pin_memory" in zero.get(part, {}):
            zero[part]["pin_memory"] = False  # page-locked memory is a GPU's matter
    if sharding_of(config).parameters:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    optimizer = config.get("optimizer", {})
    if optimizer.get("type", "AdamW") not in ("AdamW", "Adam"):
        raise UserError(f"--ds_config asks for the optimizer {optimizer['type']}; supported: AdamW")
    params = optimizer.get("params", {})
    ours = {
        "lr": options.learning_rate,
        "betas": list(options.betas),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    for key, value in ours.items():
        if not _agrees(params.get(key, "auto"), value):
            raise UserError(
                f"--ds_config sets optimizer.params.{key} to {params[key]!r}, the flags to {value}; leave it out of "
                "the JSON"
            )
    config["optimizer"] = {"type": "AdamW", "params": {k: v for k, v in params.items() if v != "auto"} | ours}
    config.setdefault("steps_per_print", 10**9)  # the run's own progress bar says it
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def _agrees(given: Any, ours: Any) -> bool:
    """Whether a value of the JSON is ours or leaves it to us. True is no 1."""
    return given == "auto" or (given == ours and isinstance(given, bool) is isinstance(ours, bool))
