"""The DeepSpeed JSON of ``--ds_config``, read and checked. No torch in here."""

import difflib
import json
from pathlib import Path
from typing import Any

from diffdpo.errors import UserError

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
    """The DeepSpeed JSON of ``--ds_config``."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "none in ./ds_configs"
        raise UserError(f"--ds_config {path}: no such file; shipped: {shipped}") from None
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
