"""The beginning and the end of a run, whatever it trains: its record is opened, and closed on every way out."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from data_pipeline.dataset import ShardedDataset
from data_pipeline.reader import PairLoader
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.evaluation.result import Evaluation
from diffdpo.models.load import LoadedModel
from diffdpo.settings.base import public, without_secrets
from diffdpo.settings.credentials import STORE
from diffdpo.setup.context import RunContext
from diffdpo.setup.data import total_steps
from diffdpo.setup.model import save_final
from diffdpo.setup.publish import push_final
from diffdpo.step.report import StepReport
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import Shipped, quiet_mlflow
from diffdpo.tracking.nodes import tell_of_this_node
from diffdpo.tracking.run import Tracking, named_elsewhere, run_tags, tracking_uri
from diffdpo.training.best import Best
from diffdpo.training.callbacks import Callback, Callbacks
from diffdpo.training.card import how_it_was_made
from diffdpo.training.checkpoint import (
    read_state,
    set_aside_after,
    told_if_unwritable,
)
from diffdpo.training.finish import finish
from diffdpo.training.guard import Watch
from diffdpo.training.held_memory import HeldMemory
from diffdpo.training.loop import EVALUATION, Loop, StepFunction
from diffdpo.training.manifest import publish, sync_tree
from diffdpo.training.measured import HeldOut, Measured
from diffdpo.training.record import data_inputs, environment_of, parameters_of, write_record
from diffdpo.training.replay import replay
from diffdpo.training.resume import finished_summary, held_by, resume_parts
from diffdpo.training.room import check_room
from diffdpo.training.schedule import in_steps


@dataclass(frozen=True)
class Result:
    """What a run came to. ``summary``: that of ``summary.json``, whose ``held_out`` has each metric before, after and
    the change, with standard errors; empty where the run was stopped, or took no steps. ``model`` and ``tokenizer``
    are what was trained, in eval mode. ``run_id`` is MLflow's, None without it."""

    output_dir: Path
    steps: int
    complete: bool
    summary: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    run_id: str | None = None

    @classmethod
    def of_precomputation(cls, output_dir: Path) -> "Result":
        """The result of a run that made reference scores and ended."""
        return cls(output_dir, steps=0, complete=True)

    @classmethod
    def of_a_stop(cls, context: RunContext) -> "Result":
        """The result of a run that was told to stop where it had nothing to save."""
        return cls(context.output_dir, steps=0, complete=False)


@dataclass(frozen=True)
class Run:
    """What a command has built. The rest of a run, :func:`carry_out`, is the same for all commands."""

    config: RunConfig  # with all that was chosen
    asked: RunConfig  # as it was given
    facts: dict[str, Any]  # what else a reader of the record wants to know
    context: RunContext
    watch: Watch
    resume: Path | None  # a checkpoint
    data: ShardedDataset
    loader: PairLoader
    loaded: LoadedModel
    engine: Engine
    step: StepFunction
    held_out: HeldOut
    check_first: Callable[[StepReport], None]
    unit: str  # what a record is called
    base: str | None  # folder or name of what was trained, for the model card; None: random weights
    callbacks: Sequence[Callback] = ()
    reference: nn.Module | None = None  # a second module in memory
    step_is_of_records: bool = True  # whether the loss of a record depends on that record alone


def carry_out(run: Run) -> Result:
    """Before, train, after; the record of it and the final model."""
    config, context, engine, held_out = run.config, run.context, run.engine, run.held_out
    if config.replay is not None:
        replay(Path(config.replay), context, engine, run.step, alone=run.step_is_of_records)
        return Result(context.output_dir, steps=0, complete=True)
    state, changes = (read_state(run.resume) if run.resume else {}), []
    if run.resume:  # before anything of the run's record is touched: a refusal must leave it as it was
        changes = resume_parts(config, context, run.resume, engine, run.loader)
    check_room(config, context, engine)
    tracking = start_tracking(run, state=state, changes=changes)
    with finish(context, tracking, run.watch, config) as end:
        run.watch.pulse.beat(EVALUATION, state.get("step", 0))
        measured = Measured(held_out, tracking, data=run.facts["held_out_fingerprint"], resume_step=state.get("step"))
        before = measured.again(Evaluation(state["before"])) if run.resume else measured.evaluate("before")
        held = HeldMemory(engine, run.reference)
        loop = _loop_of(run, tracking, before, resumed=state, callbacks=(*run.callbacks, held))
        measured.follow(loop)
        if loop.best is not None:
            loop.best.check(before.means())
        if not run.resume:
            loop.record_evaluation(before.means())
        end.phase = "in training"
        complete = loop.run()
        run.watch.pulse.beat("end", loop.done)
        if not_learned := run.loader.summary(engine.world.all_reduce_sums):
            context.print(f"data    {not_learned}")
        if complete:
            kept = loop.settle_for_the_best()
            folder = context.output_dir / "final"
            _save_whole(folder, engine, run.loaded, block_size=config.block_size)
            end.phase = f"in the evaluation after training; the trained model is in {folder}"
            run.watch.pulse.beat(EVALUATION, loop.done)
            after = measured.evaluate("after")
            if kept == loop.done:  # else they stand where they were measured
                loop.record_evaluation(after.means())
            made = how_it_was_made(config, run.facts)
            end.write_card(folder, before, after, base=run.base, asked=run.asked, made=made)
            end.completed(steps=loop.done, kept=kept, engine=engine, held=held)
        else:
            end.stopped(loop.done)
        loop.callbacks.on_end(loop.done)
    if complete and config.push_to_hub:
        run.watch.pulse.beat("push to the hub", loop.done)
        address = push_final(config, context.world, context.output_dir / "final", run_folder=context.output_dir)
        context.print(f"hub     {address}")
    context.world.barrier()
    return Result(
        output_dir=context.output_dir,
        steps=loop.done,
        complete=complete,
        summary=end.summary,
        model=run.loaded.model.eval(),
        tokenizer=run.loaded.tokenizer,
        run_id=tracking.mlflow.shipped.run_id if tracking and tracking.mlflow else None,
    )


def finished_before(config: RunConfig, context: RunContext) -> Result | None:
    """The result of a run that ``--resume_from_checkpoint auto`` finds finished; None where there is more to do."""
    summary = finished_summary(config, context)
    if summary is None:
        return None
    return Result(context.output_dir, summary["steps"], complete=True, summary=summary)


def _goes_on_here(checkpoint: Path | None, output_dir: Path) -> bool:
    """Whether a run goes on in its own folder: in another one the journal of the first is not missed."""
    return checkpoint is not None and checkpoint.resolve().parents[1] == output_dir.resolve()


def _save_whole(folder: Path, engine: Engine, loaded: LoadedModel, *, block_size: int | None) -> None:
    """``final/`` appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    with told_if_unwritable(folder):
        try:
            if engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            save_final(partial, engine, loaded, block_size=block_size)
            if engine.world.is_main:
                sync_tree(partial)
                publish(partial, folder)
        except BaseException:  # half a model is nobody's
            if engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _loop_of(
    run: Run,
    tracking: Tracking | None,
    before: Evaluation,
    *,
    resumed: Mapping[str, Any],
    callbacks: Sequence[Callback],
) -> Loop:
    total = total_steps(run.config, run.loader)
    return Loop(
        config=in_steps(run.config, total),
        output_dir=run.context.output_dir,
        engine=run.engine,
        loader=run.loader,
        step=run.step,
        total_steps=total,
        journal=tracking.journal if tracking else None,
        evaluate=run.held_out.quick,
        check_first=run.check_first,
        callbacks=Callbacks(callbacks),
        unit=run.unit,
        watch=run.watch,
        state={"before": dict(before.values), "config": public(run.config), "held_by": held_by(run.engine)},
        best=Best.of(run.config, resumed),
        done=resumed.get("step", 0),
    )


def _lines_every(state: Mapping[str, Any]) -> int | None:
    """Steps between the lines of the journal that a checkpoint's run has written, where that was a number of them."""
    steps = state.get("config", {}).get("logging_steps")
    return int(steps) if isinstance(steps, int | float) and steps >= 1 else None


def start_tracking(run: Run, *, state: Mapping[str, Any], changes: Sequence[str]) -> Tracking | None:
    """Write the record's files (``record.py``); open the journal and MLflow: rank 0. Other hosts are measured.

    ``state``: of the checkpoint that is resumed; ``changes``: of settings since it was written.
    """
    config, context, step = run.config, run.context, state.get("step")
    output_dir, uri = context.output_dir, tracking_uri(config.tracking_uri, context.output_dir)
    in_mlflow, companions = uri is not None and "mlflow" in config.trackers(), context.world.companions
    if not context.world.is_main:
        if in_mlflow and companions is not None and context.world.local_rank == 0:
            quiet_mlflow()
            tell_of_this_node(companions)
        return None
    ds_config = dict(run.engine.choice.given)
    environment = environment_of(
        context.world, without_secrets(sys.argv, config), run.facts | {"data_fingerprint": run.data.fingerprint}
    )
    with told_if_unwritable(output_dir):
        write_record(output_dir, resolved=config, asked=run.asked, ds_config=ds_config, environment=environment)
        for path in set_aside_after(output_dir, step) if step is not None else ():
            context.print(f"{path.name} is set aside: this run goes on from step {step}")
        journal = Journal(
            output_dir,
            resume_step=step,
            position=state.get("journal") if _goes_on_here(run.resume, output_dir) else None,
            every=_lines_every(state),
            say=context.print,
            wait_for_room=config.save_on_full_disk == "continue",
            told=partial(told_if_unwritable, output_dir),
        )
        for change in changes:
            journal.note(step or 0, change)
        tracking = Tracking(output_dir, journal)
        tracking.start_readers(config.trackers(), context.run_name, config.experiment_name, public(config))
        if uri is not None and in_mlflow:
            shipped = Shipped(
                uri,
                config.experiment_name,
                context.run_name,
                parameters_of(config, environment),
                run_tags(environment["git"]) | config.tags(),
                datasets=data_inputs(config, environment),
            )
            if named_elsewhere(run.asked.tracking_uri):
                context.print(f"mlflow  {uri}, as {STORE} says")
            tracking.start_mlflow(shipped, elsewhere=run.asked.tracking_uri is not None, companions=companions)
    return tracking
