"""How a run ends: its record is closed on every way out, and the user told what there is."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from data_pipeline.files import write_whole
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.engine.world import part
from diffdpo.errors import Stopped, TrainingError, UserError
from diffdpo.evaluation.result import Evaluation, comparison
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.settings.credentials import in_a_line
from diffdpo.setup.context import RunContext
from diffdpo.tracking.journal import FILE, read_journal
from diffdpo.tracking.mlflow_run import missing_credentials
from diffdpo.tracking.registry import register
from diffdpo.tracking.run import Tracking, open_command
from diffdpo.training.card import model_card
from diffdpo.training.checkpoint import list_checkpoints, told_if_unwritable
from diffdpo.training.guard import Watch
from diffdpo.training.held_memory import HeldMemory
from diffdpo.training.result import print_comparison, write_summary
from diffdpo.training.resume import asked_of

CLOSING = "the end of the record"  # a stage of the pulse
LOCAL_SECONDS = 60.0  # for an sqlite file


class Finish:
    """How a run ends: what the user is told and what is written."""

    def __init__(self, context: RunContext, tracking: Tracking | None, watch: Watch, config: RunConfig):
        self.context, self.tracking, self.watch, self.config = context, tracking, watch, config
        self.status, self.started = "FAILED", time.time()
        self.phase = "before the first step"  # where the run is, for who interrupts it
        self.compared: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}

    def write_card(
        self,
        folder: Path,
        before: Evaluation,
        after: Evaluation,
        *,
        base: str | None,
        asked: RunConfig,
        made: Mapping[str, Any],
    ) -> None:
        """README.md of the final model, with the held-out results."""
        self.compared = comparison(before, after)
        if self.tracking is not None:
            with told_if_unwritable(folder):
                card = model_card(folder, base=base, config=asked, made=made, results=self.compared)
                write_whole(folder / "README.md", card.encode())

    def stopped(self, step: int) -> None:
        """A signal ended the run early, with a checkpoint."""
        self.status = "KILLED"
        self.context.print(
            f"stopped after step {step}, which is saved; go on with "
            f"--output_dir {quote(str(self.context.output_dir))} --resume_from_checkpoint latest"
        )

    def interrupted(self) -> None:
        """A signal ended the run at once, with what had been written before."""
        self.status = "KILLED"
        self.context.print(f"\nstopped {self.phase}")
        if saved := list_checkpoints(self.context.output_dir):
            self.context.print(
                f"newest checkpoint: {saved[-1]}; go on from there with "
                f"--output_dir {quote(str(self.context.output_dir))} --resume_from_checkpoint latest"
            )

    def completed(self, *, steps: int, kept: int, engine: Engine, held: HeldMemory) -> None:
        """``summary.json``; the table is printed when the record is closed. ``kept``: the step of the final model;
        ``held``: what each process holds."""
        self.status = "FINISHED"
        peaks = engine.world.all_gather_object(peak_memory_gib(engine.world.device))
        if self.tracking is None:
            return
        lines = [line for line in read_journal(self.context.output_dir / FILE) if "step_seconds" in line]
        rates = {key: _mean(lines, key) for key in ("pairs_per_second", "answers_per_second", "tokens_per_second")}
        summary = {
            "run_name": self.context.run_name,
            "steps": steps,
            "kept_step": kept,
            "asked": asked_of(self.config),
            "seconds": round(time.time() - self.started, 1),
            **{key: value for key, value in rates.items() if value is not None},
            "peak_memory_gib": max(peaks),
            "held_memory_gib": held.gib(peaks[0]),
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
        print(f"files   {output_dir}  (final/, metrics.jsonl, summary.json, plots/)")
        mlflow = self.tracking.mlflow
        if mlflow is not None:
            print(f"mlflow  run {mlflow.shipped.run_name} in experiment {mlflow.shipped.experiment}; see it with")
            print(f"        {open_command(mlflow.shipped.tracking_uri)}")
            if not arrived:
                reason = in_a_line(mlflow.error)
                print(f"        NOT all of it arrived ({reason}); send the rest with")
                print(
                    f"        python -m diffdpo.tracking {quote(str(output_dir))}{missing_credentials(mlflow.shipped)}"
                )
            if self.config.register_model:
                self._register(self.config.register_model)

    def _register(self, name: str) -> None:
        """The final model in MLflow's registry. A store that does not take it takes nothing of the run away."""
        try:
            print(f"model   {register(self.context.output_dir, name)}")
        except (UserError, TrainingError) as error:
            print(f"model   NOT registered: {error}; try again with")
            where = quote(str(self.context.output_dir))
            print(f"        python -m diffdpo.tracking {where} --register_model {quote(name)}")

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
        watch.pulse.beat(CLOSING, watch.pulse.step)  # drawing and sending have no usual time
        part()  # who has gone is known, or does not matter any more
        with watch.stop.set_deferred(True):
            end.close()
