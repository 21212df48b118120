"""The DeepSpeed JSON of ``--ds_config``: read, checked, and completed with what the flags say. No torch in here."""

import copy
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.sharding import sharding_of
from diffdpo.errors import UserError
from diffdpo.shipped import find_shipped

KNOWN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "amp", "data_types", "torch_autocast"),
    *("checkpoint", "activation_checkpointing", "aio", "comms_logger", "communication_data_type"),
    *("compression_training", "elasticity", "flops_profiler", "autotuning", "csv_monitor", "tensorboard"),
    *("wandb", "comet", "data_efficiency", "dump_state", "curriculum_learning", "progressive_layer_drop"),
    *("eigenvalue", "sparse_attention", "sparse_gradients", "compile", "disable_allgather"),
    *("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients", "hybrid_engine"),
    *("managed_gradient_accumulation", "memory_breakdown", "steps_per_print", "wall_clock_breakdown", "seed"),
    *("seq_parallel_communication_data_type", "nebula", "pipeline", "weight_quantization", "tensor_parallel"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "use_data_before_expert_parallelism"),
    *("dataloader_drop_last", "disable_python_gc", "graph_harvesting", "timers"),
)
"""Names at the top of DeepSpeed's JSON, which itself passes over any other without a word."""


def read_ds_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON of ``--ds_config``: a file, or the name of a shipped one."""
    path = find_shipped("ds_configs", str(path), flag="--ds_config")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object, found {type(content).__name__}")
    zero, optimizer = "zero_optimization", "optimizer"
    for keys in (
        *((zero,), (optimizer,), ("bf16",), ("fp16",), (optimizer, "params")),
        *((zero, "offload_optimizer"), (zero, "offload_param")),
    ):
        found: Any = content
        for key in keys:
            found = found.get(key, {})
        if not isinstance(found, dict):
            raise UserError(f"--ds_config {path}: {'.'.join(keys)} must be an object, found {found!r}")
    if content.get("scheduler"):
        raise UserError(
            f"--ds_config {path} sets a scheduler; the rate is set by --lr_scheduler_type and --warmup_steps, so leave "
            "it out of the JSON"
        )
    for key in content:
        if key not in KNOWN and (meant := difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.8)):
            raise UserError(f"--ds_config {path} sets {key!r}, which DeepSpeed does not know; {meant[0]!r} is meant?")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--ds_config {path}: zero_optimization.stage is {stage!r}; allowed: 0, 1, 2, 3")
    return content


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
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f"--ds_config sets {key} to {config[key]}, the flags to {value}; leave it out of the JSON")
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
    given = config.get("optimizer", {})
    if given.get("type", "AdamW") not in ("AdamW", "Adam"):
        raise UserError(f"--ds_config asks for the optimizer {given['type']}; supported: AdamW")
    params = given.get("params", {})
    ours = {
        "lr": options.learning_rate,
        "betas": list(options.betas),
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    for key, value in ours.items():
        if params.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"--ds_config sets optimizer.params.{key} to {params[key]}, the flags to {value}; leave it out of the "
                "JSON"
            )
    config["optimizer"] = {"type": "AdamW", "params": {k: v for k, v in params.items() if v != "auto"} | ours}
    config.setdefault("steps_per_print", 10**9)  # the run's own progress bar says it
    config.setdefault("zero_allow_untested_optimizer", True)
    return config
