"""The loop: steps, their records, evaluations and checkpoints in between. It never sees a token or a logit.

The same loop runs preference training and supervised training; they differ in the step function and in what is
evaluated.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from tqdm import tqdm

from data_pipeline.batch import PairBatch
from data_pipeline.progress import bar_of
from data_pipeline.reader import PairLoader
from diffdpo.cards import peak_of
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.engine.clock import COMMUNICATION
from diffdpo.errors import TrainingError
from diffdpo.gpus import is_gpu, kind_of
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.step.report import StepReport
from diffdpo.tracking.journal import Journal
from diffdpo.training.best import Best
from diffdpo.training.callbacks import Callbacks
from diffdpo.training.checkpoint import FOLDER, NotSaved, list_checkpoints, told_if_unreadable, told_if_unwritable
from diffdpo.training.culprit import keep_culprit, keep_state
from diffdpo.training.guard import Watch
from diffdpo.training.norms import NormHistory
from diffdpo.training.saver import Saver
from diffdpo.training.schedule import learning_rate
from diffdpo.training.window import Window

StepFunction = Callable[[Sequence[PairBatch], float], StepReport]
EVALUATION = "evaluation"  # of everything, before and after: a stage of the pulse
ON_THE_BAR = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


@dataclass
class Loop:
    """What a run is made of once it is built. ``state`` goes into every checkpoint as it is. No step of ``config`` is a
    share any more (``schedule.in_steps``)."""

    config: RunConfig
    output_dir: Path
    engine: Engine
    loader: PairLoader
    step: StepFunction
    total_steps: int
    journal: Journal | None  # on rank 0 only
    evaluate: Callable[[], Mapping[str, float]]
    check_first: Callable[[StepReport], None]
    watch: Watch
    callbacks: Callbacks = field(default_factory=Callbacks)
    unit: str = "pairs"  # what a record is called
    best: Best | None = None  # where something depends on which evaluation was the best
    state: dict[str, Any] = field(default_factory=dict)
    done: int = 0  # steps taken, also by the run that is resumed
    skipped: int = 0  # of them, by this run, as they were not finite
    norms: NormHistory = field(default_factory=NormHistory)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        keep = self.config.save_total_limit
        told = (self.callbacks.on_save, self._not_saved, self._waits_for_save)
        self.saver = Saver(self.output_dir, self.engine, keep, *told)

    def run(self) -> bool:
        """Train to the end. False when a signal asked to stop before it; a checkpoint was then written."""
        with self.watch.stop.set_deferred(True), self._bar() as bar:
            try:
                complete = self._run(bar)
                self._settle()
                return complete
            finally:
                self.saver.join()

    def _run(self, bar: tqdm) -> bool:
        config, pulse, clock = self.config, self.watch.pulse, self.engine.world.clock
        window, steps, saved = Window(), self.loader.steps(), time.monotonic()
        while not self._is_over():
            clock.take()  # what was spent between steps
            started = time.perf_counter()
            pulse.beat("step", self.done + 1)
            with clock.phase("data"):
                micro_batches = next(steps)
            waited = time.perf_counter() - started
            rate = self._learning_rate(self.done + 1)
            report = self.step(micro_batches, rate)
            self.done += 1
            spent, phases = time.perf_counter() - started, clock.take()
            window.add(report, spent, waited, phases)
            self._tell(report)
            if self.done == 1:
                self.check_first(report)
            finite = self._is_finite(report, micro_batches, rate)
            wanted, busy = self.callbacks.on_step(self.done, report), spent - phases[COMMUNICATION]
            stop, due, written, busy_ranks = self._agreed(wanted, time.monotonic() - saved, busy)
            window.add_busy(busy_ranks)
            if written:
                self.saver.settle()
            save = stop or due or bool(config.save_steps and self.done % config.save_steps == 0)
            # before a checkpoint too: what a resumed run goes on with is an empty window
            evaluates = self._evaluates()
            logs = self.done % config.logging_steps == 0 or self.done == self.total_steps
            if logs or save or not finite or (evaluates and self.best):
                self._log(window, rate, bar)
                window = Window()
            bar.update()
            if not finite and (self.config.on_nonfinite == "stop" or self.skipped > self.config.nonfinite_limit):
                raise self._diverged(report)
            if self._evaluate_and_save(evaluates, save, stop):
                saved = time.monotonic()
            if stop and not self._is_over():
                return False
        return True

    def _is_over(self) -> bool:
        return self.done >= self.total_steps or (self.best is not None and self.best.stops)

    def _is_finite(self, report: StepReport, micro_batches: Sequence[PairBatch], rate: float) -> bool:
        """Whether a step's loss and gradient are finite. Where they are not, or the norm is far from those before, the
        records of the step are told; all ranks see the same numbers and do the same."""
        # a step without records has no loss, and is no sign of a run that diverges
        finite = math.isfinite(report.grad_norm) and (math.isfinite(report.loss) or not report.records)
        times = self.norms.add(report.grad_norm) if finite and report.records else None
        if finite and times is None:
            return True
        ids = self.engine.world.all_gather_object([[name for name in b.ids if name] for b in micro_batches])
        if finite:
            what = f"the gradient's norm {report.grad_norm:.3g} is {times:.0f} times its median of late"
        else:
            self.skipped += 1
            what = f"loss {report.loss}, gradient norm {report.grad_norm}"
        flat = [name for rank in ids for micro_batch in rank for name in micro_batch]
        self._note(f"{what}; records {', '.join(flat[:16])}{' ...' if len(flat) > 16 else ''}")
        if not finite:
            with told_if_unwritable(self.output_dir):
                path = keep_culprit(self.output_dir, self.done, report, rate, micro_batches, self.engine)
                if self.config.on_nonfinite == "stop":
                    keep_state(path, self.engine)
        return finite

    def _note(self, text: str) -> None:
        """Words for the screen and the journal, at the current step."""
        if self.engine.world.is_main:
            tqdm.write(f"step {self.done}: {text}")
        if self.journal is not None:
            self.journal.note(self.done, text)

    def _agreed(self, wanted: bool, since_saved: float, busy: float) -> tuple[bool, bool, bool, list[float]]:
        """Whether to stop, whether a checkpoint is due by the clock, whether one has been written, and how many seconds
        of this step each rank has worked: for all ranks the same.

        They hear of a signal at different steps and must leave the loop at the same one; the clock is rank 0's.
        Of the seconds every rank fills in its own place, so that one sum says it all.
        """
        world, minutes = self.engine.world, self.config.save_minutes
        due = world.is_main and minutes > 0 and since_saved >= 60 * minutes
        own = [round(1e6 * busy) if rank == world.rank else 0 for rank in range(world.size)]
        asked = wanted or self.watch.stop.asked.is_set()
        stops, dues, done, *micros = world.all_reduce_sums([asked, due, self.saver.is_done(), *own])
        return bool(stops), bool(dues), bool(done), [1e-6 * number for number in micros]

    def _learning_rate(self, step: int) -> float:
        config = self.config
        assert config.learning_rate is not None, "config.resolve has chosen one"
        return learning_rate(
            step,
            peak=config.learning_rate,
            total=self.total_steps,
            warmup=int(config.warmup_steps),
            kind=config.lr_scheduler_type,
            arguments=config.scheduler_arguments(),
        )

    def _tell(self, report: StepReport) -> None:
        """Adjustments of the step: on the screen and in the journal, at the step they were made in."""
        if not report.records and self.engine.world.is_main:
            tqdm.write(f"step {self.done}: none of its {self.unit} could be used, so nothing was learned in it")
        if report.notes and self.engine.world.is_main:
            for note in report.notes:
                tqdm.write(f"step {self.done}: {note}")
            if self.journal is not None:
                sizes = {"memory/segment_rows": report.segment_rows, "memory/segment_tokens": report.segment_tokens}
                self.journal.write(self.done, sizes)

    def _peak(self) -> float | None:
        """FLOP/s of all ranks' devices together, by their makers; None where that is not known."""
        world = self.engine.world
        if not is_gpu(world.device):
            return None
        peak = peak_of(kind_of(world.device).name(world.device), bf16=self.engine.choice.bf16)
        return peak and peak * world.size

    def _bar(self) -> tqdm:
        shown = self.engine.world.is_main
        return bar_of(self.total_steps, "training", unit="step", shown=shown, initial=self.done)

    def _log(self, window: Window, rate: float, bar: tqdm) -> None:
        device = self.engine.world.device
        metrics = window.metrics(self.unit, peak=self._peak()) | {
            "learning_rate": rate,
            "epoch": self.loader.epoch + self.loader.step / len(self.loader),
            "peak_memory_gib": peak_memory_gib(device),
            # of this rank, since the start: records that could not be read, were left out, or were cut
            "data/faults": self.loader.faults.total(),
            "data/dropped": self.loader.dropped.total(),
            "data/truncated": self.loader.truncated,
        }
        if self.journal is not None:
            self.journal.write(self.done, metrics)
        shown = {short: f"{metrics[key]:.3f}" for key, short in ON_THE_BAR.items() if key in metrics}
        bar.set_postfix(shown | {f"{self.unit}/s": f"{metrics[f'{self.unit}_per_second']:.1f}"}, refresh=False)

    def _evaluates(self) -> bool:
        """Whether there is an evaluation after this step; the one at the end is the run's, unless it decides."""
        if self.done == self.total_steps:
            return self.best is not None
        return bool(self.config.eval_steps) and self.done % self.config.eval_steps == 0

    def _evaluate_and_save(self, evaluates: bool, save: bool, stop: bool) -> bool:
        """Whether a checkpoint was written."""
        step, at_end = self.done, self.done == self.total_steps
        if evaluates:
            self.watch.pulse.beat("evaluation in between", step)
            started = time.perf_counter()
            with self.watch.stop.set_deferred(False):  # it may take long; the newest checkpoint stays
                metrics = self.evaluate()
                self.record_evaluation(metrics, seconds=time.perf_counter() - started)
            if self.best is not None and self.best.add(step, metrics):
                save = save or self.best.keeps
        if save and (stop or not at_end):  # at the end the final model follows, unless told to stop
            self._save(step, wait=stop)
            return True
        return False

    def settle_for_the_best(self) -> int:
        """At the end: put the best model in place of the last where that was asked for. The step of what stays."""
        if self.best is None:
            return self.done
        metric, standing = self.best.metric, self.best.standing
        if self.done < self.total_steps:
            self._note(f"stopped early: {standing.without_gain} evaluations without a better {metric}")
        if not self.best.keeps or standing.step in (0, self.done):
            return self.done
        folder = self.output_dir / FOLDER / f"step-{standing.step}"
        if not self.engine.world.broadcast(folder.is_dir()):
            self._note(f"step {standing.step} was the best by {metric}, but there was no room to keep it")
            return self.done
        with told_if_unreadable(folder):
            self.engine.load(folder)
        self._note(
            f"went back to step {standing.step}, the best of {standing.evaluations} evaluations by {metric} "
            f"({standing.value:.4f}); chosen by it, it looks better in it than on new data"
        )
        return standing.step

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written. That may take long, and is not part of a step or a copy."""
        self.watch.pulse.beat("writing of a checkpoint", self.done)
        self.saver.settle()

    def _waits_for_save(self) -> None:
        self.watch.pulse.beat("save", self.done)  # copying is one thing, writing all of it another

    def _save(self, step: int, *, wait: bool) -> None:
        self._settle()
        self.watch.pulse.beat("copy for a checkpoint", step)
        loader = self.loader.state_dict(self.engine.world.all_reduce_sums)
        state = self.state | {"step": step, "loader": loader, "best": self.best.state() if self.best else None}
        if self.journal is not None:
            self.journal.sync()
            state["journal"] = self.journal.position()
        self.saver.save(step, state, wait=wait)

    def _not_saved(self, step: int, error: NotSaved) -> None:
        """Train on without a checkpoint, or raise, as the settings say. Every rank calls."""
        if not error.full or self.config.save_on_full_disk == "stop":
            raise error
        if self.engine.world.is_main:
            tqdm.write(f"step {step}: trains on without this checkpoint: {error}")

    def record_evaluation(self, metrics: Mapping[str, float], *, seconds: float | None = None) -> None:
        """Write held-out metrics at the current step, and how long they took where that is known."""
        if self.journal is not None:
            took = {} if seconds is None else {"time/evaluation": seconds}
            self.journal.write(self.done, {f"eval/{key}": value for key, value in metrics.items()} | took)
        self.callbacks.on_evaluation(self.done, metrics)

    def _diverged(self, report: StepReport) -> TrainingError:
        saved = list_checkpoints(self.output_dir)
        advice = "a smaller --learning_rate or --max_grad_norm may help"
        if self.done == 1 and not math.isfinite(report.loss):  # nothing has been changed yet
            advice = "the weights of the model or its reference are damaged or diverged, or overflow in 16 bits"
        return TrainingError(
            f"step {self.done}: loss {report.loss}, gradient norm {report.grad_norm}; which records: the same command "
            f"with --replay {quote(f'{self.output_dir}/culprit-step-{self.done}.json')}; {advice}; newest checkpoint: "
            f"{saved[-1] if saved else 'none (see --save_steps)'}"
        )
