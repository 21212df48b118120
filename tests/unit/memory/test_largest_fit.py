"""Searching a size by doubling, without going over the budget."""

import subprocess
import sys

import torch

from diffdpo.memory.largest_fit import Fit, largest_fit, memory_budget


def search(budget: int, most: int = 64, base: int = 100, row: int = 10) -> Fit:
    seen = []

    def measure(rows: int) -> int:
        seen.append(rows)
        peak = base + row * rows
        assert peak <= budget or rows == 1, "a size that the last two say will not fit is not tried"
        return peak

    return largest_fit(measure, budget=budget, most=most)


def test_doubling_stops_before_the_budget():
    assert search(budget=100 + 10 * 33).rows == 32
    assert search(budget=100 + 10 * 31).rows == 16
    assert search(budget=10**6).rows == 64, "more rows than a micro-batch has are of no use"
    assert search(budget=10**6, most=48).rows == 48


def test_one_row_is_the_least():
    assert search(budget=1).rows == 1


def test_a_peak_that_grows_faster_than_a_line_is_left_again():
    fit = largest_fit(lambda rows: rows**3, budget=500, most=64)
    assert fit.rows == 4 and fit.tried[-1] == (8, 512)


PEAKS = """
import torch
from diffdpo.memory.largest_fit import peak_of

def hold(mib):
    torch.ones(mib * 2**20 // 4)

cpu = torch.device("cpu")
print(peak_of(lambda: hold(8), cpu), peak_of(lambda: hold(300), cpu))
"""


def test_the_peak_of_a_cpu_process_is_what_was_held_at_once():
    # a process of its own: in this one the allocator may hold what earlier tests have freed
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=120, check=True)
    small, large = map(int, done.stdout.split())
    assert 200 * 2**20 < large - small < 400 * 2**20
    cpu = torch.device("cpu")
    assert memory_budget(0.5, cpu, reserve=0) < memory_budget(0.9, cpu, reserve=0)
