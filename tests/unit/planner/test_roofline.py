"""Step times: what must make a step longer does."""

import json
from dataclasses import replace

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.planner.hardware import Host
from diffdpo.planner.plan import Machine, make_plan

BASE = {"max_length": 64, "max_prompt_length": 32, "per_device_train_batch_size": 1, "segment_rows": 2}


def plan(path, **settings):
    return make_plan(TrainConfig(model_name_or_path=path, **(BASE | settings)), Machine(None, Host(2**36)))


def test_forward_is_a_third_of_forward_and_backward(small):
    found = plan(small, segmentation="none", use_peft=False)
    policy = sum(w.flops * n for w, n in found.run.policy_work.items())
    reference = sum(w.flops * n for w, n in found.run.reference_work.items())
    assert abs(policy / reference - 3) < 0.1


def test_work_is_proportional_to_the_rows(small):
    once, four = (plan(small, segmentation="two_pass", num_mc_samples=n) for n in (2, 8))
    assert abs(four.time(GPUS["A100"]).flops / once.time(GPUS["A100"]).flops - 4) < 0.05


def test_two_pass_and_checkpoint_run_one_forward_more(small):
    flops = {
        name: plan(small, segmentation=name, num_mc_samples=8).time(GPUS["A100"]).flops
        for name in ("none", "checkpoint", "two_pass")
    }
    assert abs(flops["checkpoint"] / flops["two_pass"] - 1) < 0.03
    assert 1.2 < flops["checkpoint"] / flops["none"] < 1.3  # (4F + F of the reference) / (3F + F)


def test_a_slow_link_shows_where_parameters_travel(small, tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    found = plan(small, ds_config=str(path))
    gpu = GPUS["RTX 4080"]
    assert found.time(replace(gpu, link=gpu.link / 1000)).link > 100 * found.time(gpu).link + 1e-6
    assert plan(small).time(replace(gpu, link=1.0)).link == 0


def test_faster_gpus_take_less(small):
    seconds = [plan(small).time(GPUS[name]).seconds for name in ("RTX 4080", "RTX 4090", "H100")]
    assert seconds == sorted(seconds, reverse=True)
