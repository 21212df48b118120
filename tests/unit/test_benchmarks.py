"""Benchmarks keep what they have measured, wherever they are run from and whenever they end."""

import json
import sys
from argparse import Namespace

import pytest

from benchmarks import segment_memory, throughput
from tests.support.paths import ROOT


def test_segment_memory_keeps_every_point(tmp_path, monkeypatch):
    """Broken off at the third: two are on disk."""
    peaks = iter([1.0, 2.0])

    def measure(point):
        if (peak := next(peaks, None)) is None:
            raise KeyboardInterrupt
        return {"peak_mib": peak, "seconds": 0.1}

    monkeypatch.setattr(segment_memory, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["segment_memory.py", "--output", str(tmp_path / "memory")])
    with pytest.raises(KeyboardInterrupt):
        segment_memory.main()
    assert [point["peak_mib"] for point in json.loads((tmp_path / "memory.json").read_text())["points"]] == [1.0, 2.0]
    assert "| all | plain | 1.0 | 2.0 |" in (tmp_path / "memory.md").read_text()
    assert segment_memory.OUTPUT == ROOT / "docs/benchmarks/segment_memory"


def test_throughput_names_the_commands_that_made_its_table():
    args = Namespace(numbers="4", repeats=1, warm_up=0)
    record = {"way": "plain", "n": 4, "strategy": "one graph", "seconds": 1.0, "pairs_per_second": 1.0}
    records = [record | {"shape": shape, "utilisation": 0.5} for shape in ("tiny", "medium")]
    records[0]["command"] = throughput.command_of("tiny", args)
    text = throughput.table(records, "a machine")
    assert "`python benchmarks/throughput.py --shapes tiny --numbers 4 --repeats 1 --warm_up 0 --keep`" in text
    assert (
        "commands that were not recorded (medium (n = 4))" in text and "`python benchmarks/throughput.py`" not in text
    )
