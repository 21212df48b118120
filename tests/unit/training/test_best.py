"""Which evaluation was the best: thresholds, directions, figures that are no numbers."""

import math

import pytest

from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.settings.base import check_settings
from diffdpo.training.best import Best

FOLLOW = {"eval_steps": 1, "load_best_model_at_end": True}


def best(**settings) -> Best:
    return Best.of(TrainConfig(**FOLLOW | settings), {})


def test_directions_follow_from_the_metric_s_name_unless_told():
    assert not best().larger and not best(metric_for_best_model="eval_loss").larger
    assert best(metric_for_best_model="eval_rewards/accuracies").larger
    assert best(metric_for_best_model="eval/exact_match").metric == "exact_match"
    assert best(greater_is_better=True).larger


def test_a_gain_within_the_threshold_is_kept_but_counts_as_none():
    followed = best(early_stopping_patience=2, early_stopping_threshold=0.5)
    assert [followed.add(step, {"loss": value}) for step, value in enumerate([2.0, 1.9, 1.0, math.nan], 1)] == [
        *(True, True, True, False)
    ]
    assert followed.standing.step == 3 and followed.standing.without_gain == 1 and not followed.stops
    followed.add(5, {"loss": 0.9})
    assert followed.stops


def test_a_first_figure_that_is_no_number_is_not_the_best():
    followed = best()
    assert not followed.add(1, {"loss": math.nan}) and followed.add(2, {"loss": 5.0})


def test_what_is_not_measured_cannot_decide():
    with pytest.raises(UserError, match="measured: loss, rewards/margins"):
        best(metric_for_best_model="accuracy").check({"loss": 1.0, "rewards/margins": 0.0})
    with pytest.raises(UserError, match="eval_steps"):
        check_settings(TrainConfig(early_stopping_patience=1))
    assert Best.of(TrainConfig(), {}) is None
