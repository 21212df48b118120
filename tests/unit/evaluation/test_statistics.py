"""Error bars, calibration, AUC and sign test against numbers worked by hand."""

import math

import numpy as np
import pytest

from diffdpo.evaluation.calibration import calibration_curve, expected_calibration_error
from diffdpo.evaluation.estimate import figure, mean_figure
from diffdpo.evaluation.head_to_head import head_to_head, sign_test
from diffdpo.evaluation.preferences import separation


def test_the_sign_test():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(3, 3) == 1.0


def test_head_to_head_counts_items_that_both_have():
    found = head_to_head({"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0}, {"b": 0.0, "a": 1.0, "c": 1.0, "e": 1.0})
    assert (found["win"], found["tie"], found["lose"], found["p_value"]) == (1, 1, 1, 1.0)
    assert found["change"]["mean"] == 0.0 and found["change"]["count"] == 3
    assert found["change"]["stderr"] == pytest.approx(1 / math.sqrt(3))


def test_calibration():
    confidence, right = np.array([0.52, 0.54, 0.97, 1.0]), np.array([1.0, 0.0, 1.0, 0.5])
    curve = calibration_curve(confidence, right)
    assert [each["count"] for each in curve] == [2, 2]
    assert curve[0]["confidence"] == pytest.approx(0.53) and curve[0]["right"] == 0.5
    assert (curve[1]["from"], curve[1]["to"], curve[1]["right"]) == (0.95, 1.0, 0.75)
    assert expected_calibration_error(curve) == pytest.approx((2 * 0.03 + 2 * (0.985 - 0.75)) / 4)
    assert expected_calibration_error([]) == 0.0


def test_auc_by_hand():
    """Of 3 x 2 comparisons 4 are won and one is a tie."""
    values = separation(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.5]))
    assert values.mean() == pytest.approx((2 + 0.5 + 2) / 6)


def test_the_bootstrap_s_interval_is_that_of_the_binomial():
    values = np.array([1.0] * 30 + [0.0] * 70)
    found = mean_figure(values)
    assert found["mean"] == pytest.approx(0.3) and found["count"] == 100
    assert found["stderr"] == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    # the middle 95 % of Binomial(100, 0.3) / 100 is 0.21 .. 0.39
    assert found["low"] == pytest.approx(0.21, abs=0.015) and found["high"] == pytest.approx(0.39, abs=0.015)
    assert mean_figure(values) == found
    spread = figure(lambda index: float(values[index].mean()), 100)["stderr"]
    assert spread == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.1)


def test_one_item_has_no_error():
    assert mean_figure([1.0]) == {"mean": 1.0, "stderr": None, "low": None, "high": None, "count": 1}
