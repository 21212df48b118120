"""The learning rate against transformers' own schedules, at its ends, and shares of all steps."""

import inspect

import pytest
import torch
from transformers import get_scheduler

from diffdpo.config import TrainConfig, make_config
from diffdpo.settings.schedule import NOT_OFFERED
from diffdpo.settings.schedule import SCHEDULES as DECLARED
from diffdpo.training.schedule import OF_WARM_UP, SCHEDULES, in_steps, learning_rate, resolve_steps

PEAK, TOTAL = 2e-3, 60
CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 30}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 5e-4, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3}),
    ("warmup_stable_decay", {"num_decay_steps": 20}),
    ("warmup_stable_decay", {"num_decay_steps": 15, "num_stable_steps": 10, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear", "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"}),
]


def rates_of_transformers(kind: str, warmup: int, arguments: dict) -> list[float]:
    """Of its steps 0, 1, ..."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedule = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=arguments
    )
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_after_the_warm_up_rates_are_those_of_transformers(kind, arguments, warmup):
    theirs = rates_of_transformers(kind, warmup, arguments)
    for step in range(warmup + 1, TOTAL + 1):
        ours = learning_rate(step, peak=PEAK, total=TOTAL, warmup=warmup, kind=kind, arguments=arguments)
        assert ours == pytest.approx(theirs[step - 1], rel=1e-9, abs=1e-15), step


@pytest.mark.parametrize(("kind", "arguments"), [case for case in CASES if case[0] != "constant"])
def test_in_the_warm_up_they_are_a_step_ahead(kind, arguments):
    """transformers begins at 0 (but for one schedule): its first step would change nothing."""
    warmup, theirs = 7, rates_of_transformers(kind, 7, arguments)
    ahead = 0 if kind == "cosine_warmup_with_min_lr" else 1
    for step in range(1, warmup + 1 - ahead):
        ours = learning_rate(step, peak=PEAK, total=TOTAL, warmup=warmup, kind=kind, arguments=arguments)
        assert ours == pytest.approx(theirs[step - 1 + ahead], rel=1e-9, abs=1e-15), step
    assert learning_rate(7, peak=PEAK, total=TOTAL, warmup=7, kind=kind, arguments=arguments) == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_every_step_trains(kind):
    assert all(learning_rate(step, peak=1.0, total=5, warmup=2, kind=kind) > 0 for step in range(1, 6))
    assert learning_rate(1, peak=1.0, total=1, warmup=0, kind=kind) == 1.0


def test_constant_has_no_warm_up():
    assert learning_rate(1, peak=2.0, total=10, warmup=5, kind="constant") == 2.0
    assert learning_rate(1, peak=2.0, total=10, warmup=5, kind="constant_with_warmup") == pytest.approx(0.4)


def test_settings_declare_the_schedules_and_arguments_that_there_are():
    assert set(SCHEDULES) == set(DECLARED) == {kind for kind, _ in CASES}
    for name, function in SCHEDULES.items():
        takes = set(list(inspect.signature(function).parameters)[1:])
        assert set(DECLARED[name]) - set(OF_WARM_UP) == takes, name


def test_every_name_of_transformers_is_offered_or_refused_by_name():
    from transformers import SchedulerType

    assert {str(kind.value) for kind in SchedulerType} == set(DECLARED) | set(NOT_OFFERED)


def test_steps_from_numbers_and_from_shares():
    for value, total, steps in (
        (0, 90, 0),
        (7, 90, 7),
        (0.1, 90, 9),
        (0.1, 91, 10),
        (1 / 3, 9, 3),
        (0.07, 100, 7),
        (1e-9, 5, 1),
    ):
        assert resolve_steps(value, total) == steps
    for epochs in range(2, 60):  # the share of an epoch is the epoch, to the step
        for length in (1, 7, 96, 1013):
            assert resolve_steps(1 / epochs, epochs * length) == length


def test_settings_of_a_loop_have_no_shares():
    config = make_config(TrainConfig, {"warmup_steps": 0.1, "eval_steps": 0.5, "save_steps": 4, "logging_steps": 0.01})
    steps = in_steps(config, 40)
    assert (steps.warmup_steps, steps.eval_steps, steps.save_steps, steps.logging_steps) == (4, 20, 4, 1)
    assert config.warmup_steps == 0.1, "what was asked for stays as it was"
