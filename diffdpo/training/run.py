"""The beginning and the end of a run, whatever it trains: its record is opened, and closed on every way out."""

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data_pipeline.dataset import ShardedDataset
from data_pipeline.reader import PairLoader
from diffdpo import __version__
from diffdpo.config import RunConfig, to_yaml
from diffdpo.engine.base import Engine, count_parameters
from diffdpo.errors import UserError
from diffdpo.evaluation.result import Evaluation, comparison
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.models.load import LoadedModel
from diffdpo.setup.context import RunContext
from diffdpo.setup.data import total_steps
from diffdpo.setup.model import save_final
from diffdpo.step.report import StepReport
from diffdpo.tracking.journal import FILE, Journal, read_journal
from diffdpo.tracking.mlflow_run import Shipped
from diffdpo.tracking.run import Tracking, open_command, run_tags, tracking_uri
from diffdpo.training.callbacks import Callback, Callbacks
from diffdpo.training.checkpoint import (
    in_words,
    list_checkpoints,
    planned_bytes,
    read_state,
    set_aside_after,
    told_if_unreadable,
    told_if_unwritable,
)
from diffdpo.training.guard import Watch
from diffdpo.training.loop import EVALUATION, Loop, StepFunction
from diffdpo.training.manifest import publish, sync_tree
from diffdpo.training.result import model_card, print_comparison, write_summary
from diffdpo.training.stop import Stopped

LOCAL_SECONDS = 60.0  # for an sqlite file


class HeldOut(Protocol):
    """What a command measures on held-out data."""

    def evaluate(self, when: str) -> Evaluation:
        """Everything, before or after."""
        ...

    def quick(self) -> dict[str, float]:
        """Means of what is cheap enough for between steps."""
        ...


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
        """Of a run that made reference scores and ended."""
        return cls(output_dir, steps=0, complete=True)

    @classmethod
    def of_a_stop(cls, context: RunContext) -> "Result":
        """Of a run that was told to stop where it had nothing to save."""
        return cls(context.output_dir, steps=0, complete=False)


@dataclass(frozen=True)
class Run:
    """What a command has built. The rest of a run, :func:`carry_out`, is the same for all commands."""

    config: RunConfig
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
    base: str  # what was trained, for the model card
    callbacks: Sequence[Callback] = ()


def carry_out(run: Run) -> Result:
    """Before, train, after; the record of it and the final model."""
    config, context, engine, held_out = run.config, run.context, run.engine, run.held_out
    state, changes = (read_state(run.resume) if run.resume else {}), []
    if run.resume:  # before anything of the run's record is touched: a refusal must leave it as it was
        changes = resume_parts(config, context, run.resume, engine, run.loader)
    check_room(config, context, engine)
    tracking = start_tracking(run, state=state, changes=changes)
    with finish(context, tracking, run.watch, config) as end:
        run.watch.pulse.beat(EVALUATION, state.get("step", 0))
        before = Evaluation(state["before"]) if run.resume else held_out.evaluate("before")
        loop = _loop_of(run, tracking, before, done=state.get("step", 0))
        if not run.resume:
            loop.record_evaluation(before.means())
        end.phase = "in training"
        complete = loop.run()
        run.watch.pulse.beat("end", loop.done)
        if not_learned := run.loader.summary(engine.world.all_reduce_sums):
            context.print(f"data    {not_learned}")
        if complete:
            folder = context.output_dir / "final"
            _save_whole(folder, engine, run.loaded)
            end.phase = f"in the evaluation after training; the trained model is in {folder}"
            run.watch.pulse.beat(EVALUATION, loop.done)
            after = held_out.evaluate("after")
            loop.record_evaluation(after.means())
            end.write_card(folder, run.base, to_yaml(config), before, after)
            end.completed(steps=loop.done, engine=engine)
        else:
            end.stopped(loop.done)
        loop.callbacks.on_end(loop.done)
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
    """What ``--resume_from_checkpoint auto`` finds done already; None where there is something to do.

    UserError where more steps are asked of a finished run that has left no checkpoint to go on from.
    """
    summary_file = context.output_dir / "summary.json"
    there = summary_file.exists() and (context.output_dir / "final").is_dir()
    if config.resume_from_checkpoint != "auto" or not there:
        return None
    summary = json.loads(summary_file.read_text())
    if summary.get("asked") == _asked(config):
        context.print(f"the run in {context.output_dir} is finished: {summary['steps']} steps")
        return Result(context.output_dir, summary["steps"], complete=True, summary=summary)
    if not list_checkpoints(context.output_dir):
        raise UserError(
            f"--output_dir {context.output_dir} holds a finished run of {summary['steps']} steps and no checkpoint "
            "to go on from; give another --output_dir"
        )
    return None


def _asked(config: RunConfig) -> dict[str, float]:
    """How long a run was meant to be."""
    return {"max_steps": config.max_steps, "num_train_epochs": config.num_train_epochs}


def check_room(config: RunConfig, context: RunContext, engine: Engine) -> None:
    """UserError where the disk has no room for the checkpoints that are to be kept, one in writing, and the model."""
    context.output_dir.mkdir(parents=True, exist_ok=True)
    one, weights = planned_bytes(engine), 4 * count_parameters(engine.module)[1]
    here = list_checkpoints(context.output_dir)
    needed = max(1, config.save_total_limit + 1 - len(here)) * one + weights
    free = shutil.disk_usage(context.output_dir).free
    if needed <= free:
        return
    told = (
        f"--output_dir {context.output_dir} has {in_words(free)} free; checkpoints of {in_words(one)} each (to keep: "
        f"{config.save_total_limit}, and one in writing) and the final model need {in_words(needed)}"
    )
    if config.save_on_full_disk == "stop":
        raise UserError(f"{told}; make room, lower --save_total_limit, or give --save_on_full_disk continue")
    context.print(f"WARNING: {told}")


def _save_whole(folder: Path, engine: Engine, loaded: LoadedModel) -> None:
    """``final/`` appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    with told_if_unwritable(folder):
        try:
            if engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            save_final(partial, engine, loaded)
            if engine.world.is_main:
                sync_tree(partial)
                publish(partial, folder)
        except BaseException:  # half a model is nobody's
            if engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _loop_of(run: Run, tracking: Tracking | None, before: Evaluation, *, done: int) -> Loop:
    return Loop(
        config=run.config,
        output_dir=run.context.output_dir,
        engine=run.engine,
        loader=run.loader,
        step=run.step,
        total_steps=total_steps(run.config, run.loader),
        journal=tracking.journal if tracking else None,
        evaluate=run.held_out.quick,
        check_first=run.check_first,
        callbacks=Callbacks(run.callbacks),
        unit=run.unit,
        watch=run.watch,
        state={"before": dict(before.values), "config": asdict(run.config), "held_by": held_by(run.engine)},
        done=done,
    )


def start_tracking(run: Run, *, state: Mapping[str, Any], changes: Sequence[str]) -> Tracking | None:
    """Write ``config.yaml``, ``ds_config.json`` and ``environment.json``; open the journal and MLflow. Rank 0 only.

    ``state``: of the checkpoint that is resumed; ``changes``: of settings since it was written.
    """
    config, context, step = run.config, run.context, state.get("step")
    if not context.world.is_main:
        return None
    output_dir, uri = context.output_dir, tracking_uri(config.tracking_uri, context.output_dir)
    ds_config = dict(run.engine.choice.given)
    environment = {
        "diffdpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": _device_name(context.world.device),
        "processes": context.world.size,
        "command": " ".join(sys.argv),
        "data_fingerprint": run.data.fingerprint,
    }
    with told_if_unwritable(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(to_yaml(config))
        (output_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=1))
        (output_dir / "environment.json").write_text(json.dumps(environment, indent=1))
        for path in set_aside_after(output_dir, step) if step is not None else ():
            context.print(f"{path.name} is set aside: this run goes on from step {step}")
        journal = Journal(
            output_dir,
            resume_step=step,
            position=state.get("journal"),
            say=context.print,
            wait_for_room=config.save_on_full_disk == "continue",
        )
        for change in changes:
            journal.note(step or 0, change)
        tracking = Tracking(output_dir, journal)
        if uri is not None:
            params = {**asdict(config), **environment, "ds_config_json": json.dumps(ds_config)}
            texts = {key: str(value) for key, value in params.items()}
            shipped = Shipped(uri, config.experiment_name, context.run_name, texts, run_tags())
            tracking.start_mlflow(shipped, elsewhere=config.tracking_uri is not None)
    return tracking


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


WITHOUT_EFFECT = {"output_dir", "resume_from_checkpoint", "data_cache_dir", "tracking_uri", "tracking_timeout"}
FREE_TO_CHANGE = WITHOUT_EFFECT | {
    *("run_name", "dataset_num_workers", "save_minutes", "save_on_full_disk", "stop_seconds", "hang_timeout"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "segmentation", "segment_rows", "max_memory"),
    *("reference_cache", "precompute_only", "strict"),
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
        if not (engine.choice.reads(value) if name == "engine" else value == ours[name]):
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: {name} was {value} and is {ours[name]}; resume with the "
                "launcher, --ds_config and adapter settings of the run that wrote it"
            )
    loader.load_state_dict(state["loader"])
    with told_if_unreadable(checkpoint):
        engine.load(checkpoint)
    context.print(f"resumed from {checkpoint} after step {state['step']}")
    changes = []
    for name, value in asdict(config).items():
        was = state["config"].get(name)
        if name not in WITHOUT_EFFECT and was != value:
            changes.append(f"--{name} was {was} and is {value}")
            if name not in FREE_TO_CHANGE:
                context.print(f"  NOTE {changes[-1]}: not the same run any more")
    return changes


class Finish:
    """How a run ends: what the user is told and what is written."""

    def __init__(self, context: RunContext, tracking: Tracking | None, watch: Watch, config: RunConfig):
        self.context, self.tracking, self.watch, self.config = context, tracking, watch, config
        self.status, self.started = "FAILED", time.time()
        self.phase = "before the first step"  # where the run is, for who interrupts it
        self.compared: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}

    def write_card(self, folder: Path, base: str, config_text: str, before: Evaluation, after: Evaluation) -> None:
        """README.md of the final model, with the held-out results."""
        self.compared = comparison(before, after)
        if self.tracking is not None:
            with told_if_unwritable(folder):
                partial = folder / "README.md.partial"
                partial.write_text(model_card(base, config_text, self.compared))
                partial.replace(folder / "README.md")

    def stopped(self, step: int) -> None:
        """A signal ended the run early, with a checkpoint."""
        self.status = "KILLED"
        self.context.print(
            f"stopped after step {step}, which is saved; go on with "
            f"--output_dir {self.context.output_dir} --resume_from_checkpoint latest"
        )

    def interrupted(self) -> None:
        """A signal ended the run at once, with what had been written before."""
        self.status = "KILLED"
        self.context.print(f"\nstopped {self.phase}")
        if saved := list_checkpoints(self.context.output_dir):
            self.context.print(
                f"newest checkpoint: {saved[-1]}; go on from there with "
                f"--output_dir {self.context.output_dir} --resume_from_checkpoint latest"
            )

    def completed(self, *, steps: int, engine: Engine) -> None:
        """``summary.json``; the table is printed when the record is closed."""
        self.status = "FINISHED"
        peaks = engine.world.all_gather_object(peak_memory_gib(engine.world.device))
        if self.tracking is None:
            return
        lines = [line for line in read_journal(self.context.output_dir / FILE) if "step_seconds" in line]
        rates = {key: _mean(lines, key) for key in ("pairs_per_second", "answers_per_second", "tokens_per_second")}
        summary = {
            "run_name": self.context.run_name,
            "steps": steps,
            "asked": _asked(self.config),
            "seconds": round(time.time() - self.started, 1),
            **{key: value for key, value in rates.items() if value is not None},
            "peak_memory_gib": max(peaks),
            "held_out": self.compared,
        }
        self.summary = summary
        write_summary(self.context.output_dir, summary)

    def close(self) -> None:
        """Ship the rest to MLflow and tell where everything is."""
        if self.tracking is None:
            return
        arrived = self.tracking.close(self.status, timeout=self._patience(), curves=self.status != "KILLED")
        if self.status != "FINISHED":
            return
        if self.compared:
            print_comparison(self.compared)
        output_dir = self.context.output_dir
        print(f"files   {output_dir}  (final/, metrics.jsonl, summary.json, plots/curves.png)")
        mlflow = self.tracking.mlflow
        if mlflow is not None:
            print(f"mlflow  run {mlflow.shipped.run_name} in experiment {mlflow.shipped.experiment}; see it with")
            print(f"        {open_command(mlflow.shipped.tracking_uri)}")
            if not arrived:
                reason = str(mlflow.error).splitlines()[0][:120]
                print(f"        NOT all of it arrived ({reason}); send the rest with")
                print(f"        python -m diffdpo.tracking {output_dir}")

    def _patience(self) -> float:
        """Seconds for MLflow: a file of ours takes what it takes, a server may hold nobody, and a run that is told to
        stop has little."""
        mlflow, given = self.tracking.mlflow if self.tracking else None, self.config.tracking_timeout
        local = mlflow is not None and mlflow.shipped.tracking_uri.startswith("sqlite")
        return max(0.0, min(max(given, LOCAL_SECONDS) if local else given, self.watch.stop.remaining() - 1.5))


def _mean(lines: list[dict[str, Any]], key: str) -> float | None:
    """Mean rate over steps, each weighted by its time; the first step, which warms caches, is left out."""
    usable = [line for line in (lines[1:] or lines) if line.get(key) is not None]
    seconds = sum(line["step_seconds"] for line in usable)
    return sum(line[key] * line["step_seconds"] for line in usable) / seconds if seconds else None


@contextmanager
def finish(context: RunContext, tracking: Tracking | None, watch: Watch, config: RunConfig) -> Iterator[Finish]:
    """The run's ``Finish``; its record is closed also when the body raises."""
    end = Finish(context, tracking, watch, config)
    try:
        yield end
    except (KeyboardInterrupt, Stopped):
        end.interrupted()
        raise
    finally:
        with watch.stop.set_deferred(True):
            end.close()
