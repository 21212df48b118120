"""The loop: steps, their records, evaluations and checkpoints in between. It never sees a token or a logit.

The same loop runs preference training and supervised training; they differ in the step function and in what is
evaluated.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.batch import PairBatch
from data_pipeline.reader import PairLoader
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.errors import TrainingError
from diffdpo.losses.metrics import means
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.progress import bar_of
from diffdpo.step.report import StepReport
from diffdpo.tracking.journal import Journal
from diffdpo.training.callbacks import Callbacks
from diffdpo.training.checkpoint import NotSaved, list_checkpoints, told_if_unwritable
from diffdpo.training.guard import Watch
from diffdpo.training.norms import NormHistory
from diffdpo.training.saver import Saver
from diffdpo.training.schedule import learning_rate

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
    state: dict[str, Any] = field(default_factory=dict)
    done: int = 0  # steps taken, also by the run that is resumed
    skipped: int = 0  # of them, by this run, as they were not finite
    norms: NormHistory = field(default_factory=NormHistory)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        keep = self.config.save_total_limit
        self.saver = Saver(self.output_dir, self.engine, keep, self.callbacks.on_save, self._not_saved)

    def run(self) -> bool:
        """Train to the end. False when a signal asked to stop before it; a checkpoint was then written."""
        with self.watch.stop.set_deferred(True), self._bar() as bar:
            try:
                complete = self._run(bar)
                self.saver.settle()
                return complete
            finally:
                self.saver.join()

    def _run(self, bar: tqdm) -> bool:
        config, pulse = self.config, self.watch.pulse
        window, steps, saved = _Window(), self.loader.steps(), time.monotonic()
        while self.done < self.total_steps:
            started = time.perf_counter()
            pulse.beat("step", self.done + 1)
            micro_batches = next(steps)
            waited = time.perf_counter() - started
            rate = self._learning_rate(self.done + 1)
            report = self.step(micro_batches, rate)
            self.done += 1
            window.add(report, time.perf_counter() - started, waited)
            self._tell(report)
            if self.done == 1:
                self.check_first(report)
            finite = self._is_finite(report, micro_batches)
            stop, due, written = self._agreed(self.callbacks.on_step(self.done, report), time.monotonic() - saved)
            if written:
                self.saver.settle()
            save = stop or due or bool(config.save_steps and self.done % config.save_steps == 0)
            # before a checkpoint too: what a resumed run goes on with is an empty window
            if self.done % config.logging_steps == 0 or self.done == self.total_steps or save or not finite:
                self._log(window, rate, bar)
                window = _Window()
            bar.update()
            if not finite and (self.config.on_nonfinite == "stop" or self.skipped > self.config.nonfinite_limit):
                raise self._diverged(report)
            self._evaluate_and_save(save, stop)
            saved = time.monotonic() if save else saved
            if stop and self.done < self.total_steps:
                return False
        return True

    def _is_finite(self, report: StepReport, micro_batches: Sequence[PairBatch]) -> bool:
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
        if not finite and self.engine.world.is_main:
            culprit = {"step": self.done, "loss": report.loss, "grad_norm": report.grad_norm, "records": ids}
            with told_if_unwritable(self.output_dir):
                (self.output_dir / f"culprit-step-{self.done}.json").write_text(json.dumps(culprit, indent=1))
        return finite

    def _note(self, text: str) -> None:
        """Words for the screen and the journal, at the current step."""
        if self.engine.world.is_main:
            tqdm.write(f"step {self.done}: {text}")
        if self.journal is not None:
            self.journal.note(self.done, text)

    def _agreed(self, wanted: bool, since_saved: float) -> tuple[bool, bool, bool]:
        """Whether to stop, whether a checkpoint is due by the clock, and whether one has been written: for all ranks
        the same.

        They hear of a signal at different steps and must leave the loop at the same one; the clock is rank 0's.
        """
        world, minutes = self.engine.world, self.config.save_minutes
        due = world.is_main and minutes > 0 and since_saved >= 60 * minutes
        stops, dues, done = world.all_reduce_sums([wanted or self.watch.stop.asked.is_set(), due, self.saver.is_done()])
        return bool(stops), bool(dues), bool(done)

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

    def _bar(self) -> tqdm:
        shown = self.engine.world.is_main
        return bar_of(self.total_steps, "training", unit="step", shown=shown, initial=self.done)

    def _log(self, window: "_Window", rate: float, bar: tqdm) -> None:
        device = self.engine.world.device
        metrics = window.metrics(self.unit) | {
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

    def _evaluate_and_save(self, save: bool, stop: bool) -> None:
        config, step = self.config, self.done
        at_end = step == self.total_steps
        if config.eval_steps and step % config.eval_steps == 0 and not at_end:
            self.watch.pulse.beat("evaluation in between", step)
            with self.watch.stop.set_deferred(False):  # it may take long; the newest checkpoint stays
                self.record_evaluation(self.evaluate())
        if save and (stop or not at_end):  # at the end the final model follows, unless told to stop
            self._save(step, wait=stop)

    def _save(self, step: int, *, wait: bool) -> None:
        self.watch.pulse.beat("save", step)
        loader = self.loader.state_dict(self.engine.world.all_reduce_sums)
        state = self.state | {"step": step, "loader": loader}
        if self.journal is not None:
            self.journal.sync()
            state["journal"] = self.journal.position()
        self.saver.save(step, state, wait=wait)

    def _not_saved(self, step: int, error: NotSaved) -> None:
        """On every rank."""
        if not error.full or self.config.save_on_full_disk == "stop":
            raise error
        if self.engine.world.is_main:
            tqdm.write(f"step {step}: trains on without this checkpoint: {error}")

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Write held-out metrics at the current step."""
        if self.journal is not None:
            self.journal.write(self.done, {f"eval/{key}": value for key, value in metrics.items()})
        self.callbacks.on_evaluation(self.done, metrics)

    def _diverged(self, report: StepReport) -> TrainingError:
        saved = list_checkpoints(self.output_dir)
        advice = "a smaller --learning_rate or --max_grad_norm may help"
        if self.done == 1 and not math.isfinite(report.loss):  # nothing has been changed yet
            advice = "the weights of the model or its reference are damaged or diverged, or overflow in 16 bits"
        return TrainingError(
            f"step {self.done}: loss {report.loss}, gradient norm {report.grad_norm} (its records: "
            f"culprit-step-{self.done}.json); {advice}; newest "
            f"checkpoint: {saved[-1] if saved else 'none (see --save_steps)'}"
        )


class _Window:
    """The steps since the last line of the journal."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.seconds, self.waited = 0.0, 0.0

    def add(self, report: StepReport, seconds: float, waited: float) -> None:
        self.reports.append(report)
        self.seconds += seconds
        self.waited += waited

    def metrics(self, unit: str) -> dict[str, float]:
        """Means over the window; rates are of all ranks together."""
        count, last = len(self.reports), self.reports[-1]
        sums = {name: sum(report.sums[name] for report in self.reports) for name in last.sums}
        records = sum(report.records for report in self.reports)
        losses = [report.loss for report in self.reports if report.records]  # a step without records has none
        return {
            **({"loss": sum(losses) / len(losses)} if losses else {}),
            **({"loss/sft": last.sft_loss} if last.sft_loss is not None and last.records else {}),
            **({"kl/reference_point": last.reference_point} if last.reference_point is not None else {}),
            **means(sums),
            "noise/num_samples": sum(report.num_samples for report in self.reports) / count,
            "grad_norm": last.grad_norm,
            f"{unit}_per_second": records / self.seconds,
            "tokens_per_second": sum(report.tokens for report in self.reports) / self.seconds,
            "step_seconds": self.seconds / count,
            "data/padding_share": sum(r.padding_tokens for r in self.reports)
            / max(1, sum(r.computed_tokens for r in self.reports)),
            "data/empty_steps": count - len(losses),
            "memory/step_retries": sum(len(report.notes) for report in self.reports),
            "data_wait_share": self.waited / self.seconds,
        }
