"""The planner's memory within 10 % of measured runs, each in a process of its own."""

import json

import pytest

from benchmarks.plan_check import CASES, check
from tests.support.paths import ROOT

RECORDED = ROOT / "docs/benchmarks/plan_check.json"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_planned_within_10_percent_of_measured(name):
    record = check(name)
    assert abs(record["error"]) < 0.1 and abs(record.get("live_error", 0)) < 0.1, record


def test_recorded_runs_are_within_10_percent():
    records = json.loads(RECORDED.read_text())["records"]
    assert len(records) >= 6
    assert all(abs(record["error"]) < 0.1 for record in records)
