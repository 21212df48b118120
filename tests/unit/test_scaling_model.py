"""Bytes by the engines' rules, and forecasts that follow from them."""

import pytest

from benchmarks.scaling_model import LINKS, Job, step_seconds, theory


def test_bytes_of_a_ring():
    assert theory("plain", 1000, 2, 5) == 4000  # however many backwards
    assert theory("zero2", 1000, 2, 2) == 2 * 4000 + 2000
    assert theory("fsdp2", 1000, 2, 1) == 2 * 2000 + 2000
    assert theory("fsdp2", 1000, 2, 1, tied=100) == 2 * 2200 + 2000
    assert theory("zero3", 1000, 2, 1) - theory("fsdp2", 1000, 2, 1) == 2000
    assert theory("zero3", 1000, 2, 2, tied=100) == 2 * (3 * 2200 + 2000)
    assert all(theory(engine, 1000, 1, 3) == 0 for engine in ("plain", "zero2", "fsdp2", "zero3"))


@pytest.mark.parametrize("hybrid", [False, True])
def test_more_gpus_are_faster_and_slow_links_are_not(hybrid):
    fast, slow = LINKS
    times = [step_seconds(Job(), gpus, fast, factor=1.0, hybrid=hybrid) for gpus in (8, 64, 512)]
    assert all(best <= worst for best, worst in times)
    assert times[0][1] > times[1][1] > times[2][1]
    assert step_seconds(Job(), 64, slow, factor=1.0, hybrid=hybrid)[1] > times[1][1]
