"""What a line of the journal says of where the time went."""

import pytest
import torch

from diffdpo.engine.clock import PHASES
from diffdpo.losses.metrics import pair_sums
from diffdpo.step.report import StepReport
from diffdpo.training.window import Window

ONE_B2 = torch.ones(1, 2)


def report() -> StepReport:
    sums = pair_sums(*torch.tensor([[[-4.0, -5.0]]] * 2), tokens_B2=ONE_B2, weight_B2=ONE_B2, beta=0.1)
    return StepReport(0.5, None, 1.0, sums, tokens=100, records=4, largest_logit=0.0, relative_logit=0.0, flops=6e9)


def test_times_ranks_and_utilisation():
    window = Window()
    for _ in range(2):
        phases = dict.fromkeys(PHASES, 0.0) | {"data": 0.1, "backward": 0.5, "communication": 0.2}
        window.add(report(), 1.0, 0.1, phases)
        window.add_busy([0.8, 0.9, 0.3])
    line = window.metrics("pairs", peak=1e10)
    assert line["time/backward"] == 0.5 and line["time/other"] == pytest.approx(0.2)
    assert sum(v for k, v in line.items() if k.startswith("time/") and "rank" not in k) == pytest.approx(1.0)
    assert (line["time/fastest_rank"], line["time/slowest_rank"]) == pytest.approx((0.3, 0.9))
    assert line["time/slowest_rank_number"] == 1
    assert line["model_flops_utilisation"] == pytest.approx(0.6)
    assert "model_flops_utilisation" not in window.metrics("pairs")


def test_one_rank_has_no_spread():
    window = Window()
    window.add(report(), 1.0, 0.1, dict.fromkeys(PHASES, 0.0))
    window.add_busy([0.8])
    assert not [key for key in window.metrics("pairs") if "rank" in key]
