"""Options in the file of ``accelerate launch`` that say something else than the flags, which are what holds."""

import os
from collections.abc import Mapping

from diffdpo.config import RunConfig
from diffdpo.engine.choice import EngineChoice

UNSAID = {  # what the variables hold where the file says nothing
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "none",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def passed_over(config: RunConfig, choice: EngineChoice, environment: Mapping[str, str] | None = None) -> list[str]:
    """A sentence where options of Accelerate's file say something else than the flags, which are what holds."""
    environment = os.environ if environment is None else environment
    cut, zero = choice.sharding, environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    fsdp = environment.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    ours = {
        "ACCELERATE_MIXED_PRECISION": "bf16" if choice.bf16 else "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(config.gradient_accumulation_steps),
    }
    if fsdp:
        ours |= {
            "FSDP_OFFLOAD_PARAMS": str(config.fsdp_cpu_offload).lower(),
            "FSDP_RESHARD_AFTER_FORWARD": str(config.fsdp_reshard_after_forward).lower(),
            "FSDP_ACTIVATION_CHECKPOINTING": str(config.gradient_checkpointing).lower(),
        }
    if zero:
        ours |= {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(cut.stage),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": cut.optimizer_on.replace("device", "none"),
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": cut.parameters_on.replace("device", "none"),
        }
    said = {name: environment[name].lower() for name in ours if environment.get(name)}
    unsaid = {name: (ours[name], "auto", UNSAID[name]) for name in said}
    unlike = [f"{name} {value}" for name, value in said.items() if value not in unsaid[name]]
    if not unlike or not (fsdp or zero):
        return []
    return [f"accelerate's file says {', '.join(unlike)}; the flags say otherwise, and they are what this run does"]
