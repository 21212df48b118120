"""What is said of a run that does not fit: the table of GPUs knows the host too, and the context is the model's."""

import pytest

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.planner.hardware import Host
from diffdpo.planner.memory import DEVICE
from diffdpo.planner.plan import Machine, make_plan
from diffdpo.planner.report import _fit, as_json, as_text


def planned(path: str, machine: Machine, **settings):
    sizes = {"max_length": 64, "max_prompt_length": 32, "num_mc_samples": 1} | settings
    return make_plan(TrainConfig(model_name_or_path=path, **sizes), machine)


@pytest.mark.parametrize(("host", "lacks"), [(2**30, "host"), (2**40, ""), (None, "")])
def test_a_host_that_is_too_small_is_no_fit_in_the_table_either(small, host, lacks):
    plan = planned(small, Machine(GPUS["H200"], Host(host) if host else None))
    assert plan.lacks(GPUS["H200"]) == lacks == as_json(plan, None)["time"]["H200"]["lacks"]
    (line,) = [line for line in as_text(plan, None).splitlines() if line.startswith("H200  ")]
    assert line.split()[2] == (lacks or "yes")
    assert ("fits 'host': on the GPU, but not" in as_text(plan, None)) == bool(lacks)


def test_a_gpu_that_is_too_small_is_named_first(small):
    plan = planned(small, Machine(GPUS["RTX 4080"], Host(2**30)))
    tiny = GPUS["RTX 4080"].__class__("tiny", plan.need(DEVICE) - 1, 1e12, 1e12, 1e9, 1e9)
    assert plan.lacks(tiny) == "GPU"


def test_a_length_above_the_context_is_told(small):
    context = planned(small, Machine(None, None)).context
    assert context == 4096
    for length, told in ((context, False), (context + 1, True)):
        plan = planned(small, Machine(None, None), max_length=length)
        assert ("the model was made for 4096 tokens at most" in as_text(plan, None)) == told


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (970, "fits"),
        (971, "fits, hardly: 29 MiB to spare, which a screen or another program takes"),
        (1001, "DOES NOT"),
    ],
)
def test_what_hardly_fits_is_told(need, said):
    assert _fit(need * 2**20, 1000 * 2**20).startswith(said)
    assert ("hardly" in said) == ("hardly" in _fit(need * 2**20, 1000 * 2**20))
