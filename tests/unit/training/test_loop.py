"""The loop with a step that does nothing: what is written when, when it saves and evaluates, and how it stops."""

from collections import Counter

import numpy as np
import pytest
import torch

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.config import TrainConfig
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError
from diffdpo.step.report import StepReport
from diffdpo.tracking.journal import FILE, Journal, read_journal
from diffdpo.training.best import Best, Standing
from diffdpo.training.callbacks import Callback, Callbacks
from diffdpo.training.culprit import each_record, read_culprit
from diffdpo.training.guard import Watch
from diffdpo.training.heartbeat import Pulse
from diffdpo.training.loop import Loop

SETTINGS = {"learning_rate": 1.0, "warmup_steps": 0, "lr_scheduler_type": "linear"}
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def micro_batch() -> PairBatch:
    sides = [TokenAnswer(np.array([5, 6, 7]), 1), TokenAnswer(np.array([5, 8]), 1)]
    pairs = [TokenPair(name, *sides) for name in ("a", "b")]
    return collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True, records=(0, 1))


class FakeLoader:
    """Five steps an epoch, one micro-batch of two named records each."""

    def __init__(self):
        self.epoch = self.step = self.truncated = 0
        self.faults, self.dropped = Counter(), Counter()

    def __len__(self):
        return 5

    def steps(self):
        while True:
            yield [micro_batch()]
            self.step += 1

    def state_dict(self, summed):
        return {"epoch": self.epoch, "step": self.step}


def report(loss: float = 0.5, norm: float = 1.0, records: int = 2) -> StepReport:
    sums = {"pairs": 2.0, "margin": 1.0}
    return StepReport(
        loss=loss,
        sft_loss=None,
        grad_norm=norm,
        sums=sums,
        tokens=10,
        records=records,
        largest_logit=0.0,
        relative_logit=0.0,
    )


class FakeSaver:
    """Notes what would be saved."""

    def __init__(self, happened, on_save):
        self.happened, self.on_save = happened, on_save

    def save(self, step, state, *, wait):
        assert state["step"] == step and state["loader"]["step"] >= 0
        self.happened.append(("save", step))
        self.on_save(step, None)

    def is_done(self):
        """Nothing is ever under way."""
        return False

    def settle(self):
        """Nothing to wait for."""

    join = settle

    def snapshot(self):
        """It waits for its saves."""


class FakeEngine:
    """Its weights survive a step that is not finite."""

    world = WORLD

    def save(self, folder):
        (folder / "weights").write_text("before the step")


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """``loop(settings, step=…, total=…)`` → the Loop and what happened, in order."""

    def make(settings=None, *, step=lambda batches, rate: report(), total=6, callbacks=(), losses=None):
        happened = []
        monkeypatch.setattr("diffdpo.training.loop.Saver", lambda *given: FakeSaver(happened, given[3]))
        monkeypatch.setattr("diffdpo.training.window.means", lambda sums: {"rewards/margins": sums["margin"]})
        made = Loop(
            config=TrainConfig(
                **{"learning_rate": 1.0, "warmup_steps": 0, "lr_scheduler_type": "linear"} | (settings or {})
            ),
            output_dir=tmp_path,
            engine=FakeEngine(),
            loader=FakeLoader(),
            step=lambda batches, rate: (happened.append(("step", rate)), step(batches, rate))[1],
            total_steps=total,
            journal=Journal(tmp_path),
            evaluate=lambda: (happened.append("evaluation"), {"loss": next(losses) if losses else 0.1})[1],
            check_first=lambda first: happened.append("first"),
            watch=Watch(Pulse(WORLD, tmp_path, 0.0)),
            callbacks=Callbacks(callbacks),
        )
        made.best = Best.of(made.config, {})
        return made, happened

    return make


def test_a_run_to_its_end(loop, tmp_path):
    made, happened = loop({"eval_steps": 2, "save_steps": 4})
    assert made.run() is True
    rates = [round(event[1], 6) for event in happened if event[0] == "step"]
    assert rates == [round(1 - step / 6, 6) for step in range(6)], "linear, the last step still trains"
    assert happened[1] == "first" and happened.count("first") == 1
    assert happened.count("evaluation") == 2, "after steps 2 and 4; the one at the end is the run's"
    assert [event for event in happened if event[0] == "save"] == [("save", 4)]
    lines = read_journal(tmp_path / FILE)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_patience_ends_a_run_and_every_better_model_is_kept(loop, tmp_path):
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True, "logging_steps": 10}
    made, happened = loop(settings, losses=iter([3.0, 2.0, 2.5, 2.0, 0.0]))
    assert made.run() is True and made.done == 4, "two evaluations that were no better than the second"
    assert [event[1] for event in happened if event[0] == "save"] == [1, 2]
    assert made.best.standing == Standing(step=2, value=2.0, evaluations=4, without_gain=2)
    assert [line["step"] for line in read_journal(tmp_path / FILE) if "loss" in line][-1] == 4
    again = Best.of(made.config, {"best": made.best.state()})
    assert again.stops and not Best.of(made.config, {"best": made.best.state() | {"metric": "x"}}).stops


def test_the_last_step_is_evaluated_where_that_decides(loop):
    made, happened = loop({"eval_steps": 4, "load_best_model_at_end": True}, losses=iter([1.0, 2.0]))
    assert made.run() is True and happened.count("evaluation") == 2
    assert made.best.standing.step == 4


def test_lines_are_means_over_their_window(loop, tmp_path):
    losses = iter([1.0, 3.0, 5.0])
    made, _ = loop({"logging_steps": 2}, step=lambda batches, rate: report(next(losses)), total=3)
    made.run()
    assert [line["loss"] for line in read_journal(tmp_path / FILE) if "loss" in line] == [2.0, 5.0]


def test_a_signal_ends_it_after_a_saved_step(loop):
    made, happened = loop()
    made.step = lambda batches, rate: (made.watch.stop.asked.set() if made.done == 2 else None, report())[1]
    assert made.run() is False
    assert made.done == 3 and happened[-1] == ("save", 3)


def test_a_callback_hears_of_everything_and_may_stop(loop):
    heard = []

    class Listener(Callback):
        def on_step(self, step, report):
            heard.append(("step", step))
            return step == 3

        def on_evaluation(self, step, metrics):
            heard.append(("evaluation", step, metrics["loss"]))

        def on_save(self, step, folder):
            heard.append(("save", step))

    made, _ = loop({"eval_steps": 2}, callbacks=[Listener()])
    assert made.run() is False
    assert heard == [("step", 1), ("step", 2), ("evaluation", 2, 0.1), ("step", 3), ("save", 3)]


@pytest.mark.parametrize("bad", [report(loss=float("nan")), report(norm=float("inf"))])
def test_what_is_not_finite_ends_the_run_with_its_line_written(loop, tmp_path, bad):
    made, _ = loop(step=lambda batches, rate: bad if made.done == 2 else report())
    with pytest.raises(TrainingError, match="step 3"):
        made.run()
    assert [line["step"] for line in read_journal(tmp_path / FILE) if "grad_norm" in line] == [1, 2, 3]


def test_the_culprit_is_kept_with_the_weights_before_it(loop, tmp_path):
    made, _ = loop(step=lambda batches, rate: report(loss=float("nan")) if made.done == 2 else report())
    with pytest.raises(TrainingError, match=r"--replay .*culprit-step-3\.json"):
        made.run()
    kept = read_culprit(tmp_path / "culprit-step-3.json")
    ((batch,),) = kept.batches
    assert kept.step == 3 and kept.learning_rate == pytest.approx(4 / 6) and kept.loss != kept.loss
    for name in ("input_ids_B2T", "lengths_B2", "prompt_lengths_B2", "weight_B2"):
        assert torch.equal(getattr(batch, name), getattr(micro_batch(), name))
    assert (batch.ids, batch.records, batch.epoch) == (("a", "b"), (0, 1), 0)
    assert [alone.ids for alone in each_record(batch)] == [("a",), ("b",)]
    assert (tmp_path / "culprit-step-3" / "weights").read_text() == "before the step"


@pytest.mark.parametrize(("limit", "taken"), [(1, 3), (2, 6)])
def test_steps_that_are_not_finite_are_left_out_up_to_the_limit(loop, tmp_path, limit, taken):
    settings = {"on_nonfinite": "skip", "nonfinite_limit": limit}
    made, _ = loop(settings, step=lambda batches, rate: report(norm=float("inf")) if made.done in (1, 2) else report())
    if taken < 6:
        with pytest.raises(TrainingError, match="step 3"):
            made.run()
    else:
        assert made.run() is True
    assert made.done == taken and made.skipped == 2
    lines = list(read_journal(tmp_path / FILE))
    assert [line["step"] for line in lines if "a, b" in line.get("note", "")] == [2, 3]
    assert {path.name for path in tmp_path.glob("culprit-*")} == {"culprit-step-2.json", "culprit-step-3.json"}


def test_a_gradient_far_from_those_before_is_told_with_its_records(loop, tmp_path):
    made, _ = loop(step=lambda batches, rate: report(norm=500.0 if made.done == 24 else 1.0), total=26)
    assert made.run() is True
    (line,) = [line for line in read_journal(tmp_path / FILE) if "note" in line]
    assert line["step"] == 25 and "500" in line["note"] and "records a, b" in line["note"]


def test_a_step_without_records_is_no_divergence(loop, capsys):
    made, _ = loop(step=lambda batches, rate: report(loss=float("nan"), norm=0.0, records=0), total=2)
    assert made.run() is True
    assert "none of its pairs could be used" in capsys.readouterr().out
