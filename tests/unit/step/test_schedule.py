"""The learning rate at its ends and in the middle."""

import pytest

from diffdpo.step.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_shapes(kind, middle, end):
    rate = {step: learning_rate(step, peak=1.0, total=110, warmup=10, kind=kind) for step in (1, 5, 10, 60, 110)}
    assert rate[1] == pytest.approx(0.1) and rate[5] == pytest.approx(0.5) and rate[10] == pytest.approx(1.0)
    assert rate[60] == pytest.approx(middle) and rate[110] == pytest.approx(end, abs=1e-12)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(1, peak=2.0, total=10**9, warmup=0, kind="cosine") == pytest.approx(2.0)
