"""The learning rate at its ends and in the middle."""

import pytest

from diffdpo.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_shapes(kind, middle, end):
    rate = {step: learning_rate(step, peak=1.0, total=110, warmup=10, kind=kind) for step in (1, 5, 10, 11, 61, 111)}
    assert rate[1] == pytest.approx(0.1) and rate[5] == pytest.approx(0.5) and rate[10] == pytest.approx(1.0)
    assert rate[11] == pytest.approx(1.0) and rate[61] == pytest.approx(middle)
    assert rate[111] == pytest.approx(end, abs=1e-12), "the step after the last"


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_every_step_trains(kind):
    assert all(learning_rate(step, peak=1.0, total=5, warmup=2, kind=kind) > 0 for step in range(1, 6))
    assert learning_rate(1, peak=1.0, total=1, warmup=0, kind=kind) == 1.0


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(1, peak=2.0, total=10**9, warmup=0, kind="cosine") == pytest.approx(2.0)
