"""Choosing n for a wanted standard error."""

import math

import pytest

from diffdpo.scores.allocate import next_num_samples


@pytest.mark.parametrize(
    ("num_samples", "stderr", "expected"),
    [
        (4, 1.0, 4),  # just met
        (4, 1.2, 6),  # 4 * 1.44
        (4, 10.0, 8),  # at most doubled
        (8, 0.1, 4),  # at most halved
        (16, 9.0, 16),  # the maximum
        (2, 0.0, 2),  # the minimum
        (4, math.nan, 4),
    ],
)
def test_next_num_samples(num_samples, stderr, expected):
    assert next_num_samples(num_samples, stderr=stderr, target=1.0, maximum=16) == expected


def test_it_settles_where_the_target_is_met():
    n = 2
    for _ in range(10):
        n = next_num_samples(n, stderr=5.0 / math.sqrt(n), target=1.0, maximum=64)
    assert n == 25


def test_target_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        next_num_samples(4, stderr=1.0, target=0.0, maximum=8)
