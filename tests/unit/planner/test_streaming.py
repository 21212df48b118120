"""Weights from the host: times of a layer worked out by hand, and what each way of keeping the state takes."""

import json
from dataclasses import replace
from math import ceil

import pytest

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.planner.plan import Machine, Plan, make_plan
from diffdpo.planner.report import as_json, as_text
from diffdpo.planner.streaming import lines, streamed_layer, streams, ways

CARD = GPUS["RTX 4080"]
PROJECTED = 4 * 128**2 + 3 * 128 * 352  # weights of a layer's seven products
TOKENS = 64


@pytest.fixture(scope="module")
def plan_of(small, tmp_path_factory):
    """``plan_of(zero_optimization)`` → the plan of a small model under it."""

    def make(zero: dict) -> Plan:
        path = tmp_path_factory.mktemp("ds") / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        options = {"max_length": TOKENS, "max_prompt_length": 32, "segment_rows": 4, "reference": "precomputed"}
        config = TrainConfig(
            model_name_or_path=small, ds_config=str(path), per_device_train_batch_size=1, num_mc_samples=8, **options
        )
        return make_plan(config, Machine(CARD, None), timed=False)

    return make


@pytest.fixture(scope="module")
def streamed(plan_of) -> Plan:
    return plan_of({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})


def test_a_layers_times_are_those_worked_out_by_hand(streamed):
    layer = streamed_layer(streamed.job, streamed.numbers, CARD)
    assert layer.bytes == 2 * (PROJECTED + 2 * 128)  # bf16, with two norms
    assert layer.transfer == pytest.approx(layer.bytes / (0.8 * 32e9))
    flops = 2 * PROJECTED * TOKENS + 4 * 128 * TOKENS**2
    assert layer.row == pytest.approx(flops / (0.55 * 97.5e12))
    assert layer.meet == ceil(layer.transfer / layer.row)


def test_a_slower_link_takes_more_rows_to_hide(streamed):
    slow = replace(CARD, link=CARD.link / 10)
    fast, late = (streamed_layer(streamed.job, streamed.numbers, gpu) for gpu in (CARD, slow))
    assert late.meet >= 9 * fast.meet
    assert fast.rows == 4 and fast.hidden == (fast.meet <= 4)


def test_state_in_other_places_and_sizes_takes_what_its_bytes_say(streamed):
    found = {way.name: way for way in ways(streamed.job, streamed.numbers, streamed.run)}
    whole = found["fp32 weights and moments on the host"]
    nvme = found["fp32 weights and moments on NVMe"]
    eight = found["8-bit moments on the host"]
    half = found["bf16 weights and moments on the host"]
    trained = streamed.numbers.trained
    assert whole.disk == 0 and nvme.disk == 16 * trained  # weights, two moments, gradients
    assert whole.host - eight.host == pytest.approx((8 - 2 * 260 / 256) * trained, abs=1)
    # weights 2 bytes less, moments 4; of gradients half of 4 bytes each, page-locked in a power of two
    assert trained == 865152 and whole.host - half.host == 6 * trained + 2**22 // 2
    assert found["that, and the weights on NVMe"].disk == nvme.disk + 2 * trained


def test_what_the_engine_cannot_do_is_not_offered(streamed):
    text = as_text(streamed, None)
    refused = [line for line in text.splitlines() if "NOT to be had" in line]
    assert [line.split("  ")[1] for line in refused] == [
        "8-bit moments on the host",
        "bf16 weights and moments on the host",
    ]
    assert "they meet at" in text
    assert as_json(streamed, None)["streamed"]["layer"]["meet"] >= 1


def test_the_plan_of_its_own_way_is_the_run_that_was_planned(streamed):
    first = ways(streamed.job, streamed.numbers, streamed.run)[0]
    assert first.host == streamed.need("host")


def test_processes_of_one_host_are_counted_together(streamed):
    """Four processes hold the state of one between them, and each its own buffers."""
    config = streamed.job.config
    four = make_plan(config, Machine(CARD, None, 4), timed=False)
    first = ways(four.job, four.numbers, four.run)[0]
    assert first.host == four.need("host") > ways(streamed.job, streamed.numbers, streamed.run)[0].host
    nvme = ways(four.job, four.numbers, four.run)[1]
    assert nvme.disk == pytest.approx(16 * four.numbers.trained, abs=64)


@pytest.mark.parametrize(
    ("slower", "said"),
    [
        (2, "a forward has 4: the transfer is NOT hidden, which --segment_rows"),
        (10, "that takes --per_device_train_batch_size 3 with --segment_rows"),
    ],
)
def test_rows_that_would_hide_the_transfer_are_rows_that_can_be_had(streamed, slower, said):
    """A micro-batch has 16 rows: no forward takes more."""
    layer = streamed_layer(streamed.job, streamed.numbers, CARD)
    link = CARD.link * layer.transfer / layer.row / (4 * slower)
    gpu = replace(CARD, link=link)
    text = "\n".join(lines(streamed.job, streamed.numbers, streamed.run, gpu))
    assert said in text and f"{streamed_layer(streamed.job, streamed.numbers, gpu).meet}" in text


def test_weights_on_the_device_are_not_streamed(plan_of):
    kept = plan_of({"stage": 2, "offload_optimizer": {"device": "cpu"}})
    assert not streams(kept.job)
    assert "they meet at" not in as_text(kept, None)
    assert as_json(kept, None)["streamed"] is None
