"""Going on from a checkpoint: what must be the same, what may change, and what is done already."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.reader import PairLoader
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine, count_parameters
from diffdpo.engine.deepspeed_files import TAG
from diffdpo.engine.zero_files import refuse_offloaded
from diffdpo.errors import UserError
from diffdpo.settings.base import public
from diffdpo.setup.context import RunContext
from diffdpo.setup.data import total_steps
from diffdpo.training.checkpoint import find_checkpoint, list_checkpoints, read_state, told_if_unreadable

WITHOUT_EFFECT = {
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "data_cache_dir",
    "tracking_uri",
    "tracking_timeout",
    "max_restarts",
    "replay",
}
FREE_TO_CHANGE = WITHOUT_EFFECT | {
    *("dataset_num_workers", "save_minutes", "save_on_full_disk", "stop_seconds", "hang_timeout"),
    *("on_nonfinite", "nonfinite_limit", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "segmentation", "segment_rows", "max_memory"),
    *("reference", "reference_cache", "precompute_only", "strict"),
    *("load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
    # where the engine that was can be another (``EngineChoice.reads``), and its number of processes
    *("engine", "ds_config", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "fsdp_shard_size"),
    *("sequence_parallel_size",),
    # their product cannot change: the reader refuses another number of records a step
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def held_by(engine: Engine) -> dict[str, Any]:
    """What must be the same when a checkpoint is read again: its files hold no other engine's state."""
    return {
        "engine": engine.choice.identity(),
        "processes": engine.world.size if engine.choice.checkpoint_is_per_rank else None,
        "trained_parameters": count_parameters(engine.module)[1],
    }


def resume_parts(
    config: RunConfig, context: RunContext, checkpoint: Path, engine: Engine, loader: PairLoader
) -> list[str]:
    """Engine and reader as they were at the checkpoint; settings that have changed since are told and returned.

    UserError when the checkpoint was written by another engine, number of processes it matters to, or set of weights.
    """
    state, ours = read_state(checkpoint), held_by(engine)
    if total_steps(config, loader) < state["step"]:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} has taken {state['step']} steps already; give a larger --max_steps "
            "or --num_train_epochs"
        )
    for name, value in state["held_by"].items():
        if not _fits(name, state["held_by"], ours, engine):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: {name} was {value} and is {ours[name]}; resume with the "
                "launcher, --ds_config and adapter settings of the run that wrote it (any engine and number of "
                "processes reads any checkpoint)"
            )
    if state["config"].get("sync_ref_model") and not public(config).get("sync_ref_model"):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: its reference has followed the policy, and without "
            "--sync_ref_model it would be the start's again; give --sync_ref_model"
        )
    loader.load_state_dict(state["loader"])
    with told_if_unreadable(checkpoint):
        engine.load(checkpoint)
    context.print(f"resumed from {checkpoint} after step {state['step']}")
    changes = []
    for name, value in public(config).items():
        was = state["config"].get(name)
        if name not in WITHOUT_EFFECT and was != value:
            changes.append(f"--{name} was {was} and is {value}")
            if name not in FREE_TO_CHANGE:
                context.print(f"  NOTE {changes[-1]}: not the same run any more")
    return changes


def checkpoint_of(config: RunConfig, context: RunContext) -> Path | None:
    """The checkpoint to go on from; None for a run that begins. UserError where there is none; every rank calls."""
    if not config.resume_from_checkpoint:
        return None
    found = find_checkpoint(config.resume_from_checkpoint, context.output_dir, context.world, context.print)
    if found is not None:
        refuse_offloaded(found / TAG)  # here already: the models take minutes
    return found


def _fits(name: str, was: dict[str, Any], ours: dict[str, Any], engine: Engine) -> bool:
    if name in ("engine", "processes"):
        other = was["engine"] != ours["engine"]  # then that is what is told
        return (name == "processes" and other) or engine.choice.reads(was["engine"], was.get("processes"))
    return was[name] == ours[name]


def finished_summary(config: RunConfig, context: RunContext) -> dict[str, Any] | None:
    """The ``summary.json`` of a run that ``--resume_from_checkpoint auto`` finds finished; None where more is to do.

    UserError where more steps are asked of a finished run that has left no checkpoint to go on from.
    """
    summary_file = context.output_dir / "summary.json"
    there = summary_file.exists() and (context.output_dir / "final").is_dir()
    if config.resume_from_checkpoint != "auto" or not there:
        return None
    try:
        summary = json.loads(summary_file.read_text())
        steps, asked = summary["steps"], summary.get("asked")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if not list_checkpoints(context.output_dir):
            raise UserError(
                f"{summary_file} is damaged ({error!r}), so whether the run is finished cannot be told, and there is "
                "no checkpoint to go on from; its model is in final/; give another --output_dir"
            ) from None
        context.print(f"{summary_file} is damaged ({error!r}): going on from the newest checkpoint")
        return None
    if asked == asked_of(config):
        context.print(f"the run in {context.output_dir} is finished: {steps} steps")
        return summary
    if not list_checkpoints(context.output_dir):
        raise UserError(
            f"--output_dir {context.output_dir} holds a finished run of {steps} steps and no checkpoint "
            "to go on from; give another --output_dir"
        )
    return None


def asked_of(config: RunConfig) -> dict[str, float]:
    """How long a run was meant to be."""
    return {"max_steps": config.max_steps, "num_train_epochs": config.num_train_epochs}
