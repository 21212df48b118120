"""Step times: what must make a step longer does."""

import json
from dataclasses import replace

import pytest

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.planner import roofline
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


def test_processes_share_a_host_s_memory_and_disk(small, tmp_path):
    """However many there are, as many bytes go to the disk and through the optimizer on the host."""
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "cpu"}}
    path = tmp_path / "nvme.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = TrainConfig(model_name_or_path=small, ds_config=str(path), **BASE)
    one, four = (make_plan(config, Machine(None, Host(2**36), gpus)).time(GPUS["RTX 4080"]) for gpus in (1, 4))
    assert one.disk > 0 and four.disk == pytest.approx(one.disk, rel=1e-4)
    assert four.optimizer == pytest.approx(one.optimizer, rel=1e-4)


def test_layers_inputs_travel_where_they_wait_on_the_host(small):
    """Each row's once down and once up; the same rows in any number of segments."""
    slow = replace(GPUS["RTX 4080"], link=1e3)
    for rows in (2, 4):
        here, away = (
            plan(small, gradient_checkpointing=True, segment_rows=rows, activation_offload=way).time(slow)
            for way in ("none", "cpu")
        )
        assert here.link == 0
        sent = 3 * 128 * (2 * 4 * 64) * 4  # layers, width, tokens, bytes
        assert away.link == pytest.approx(sent / (0.8 * 1e3), rel=1e-3)


def test_fsdp2_sends_masters_over_the_link(small):
    """Its trained weights travel in fp32 and are cast on the device; DeepSpeed's in bf16."""
    slow = replace(GPUS["RTX 4080"], link=1e3)
    found = plan(small, engine="fsdp2", fsdp_cpu_offload=True, reference="precomputed")
    passes = roofline._passes(found.job)
    assert found.time(slow).link * 0.8 * 1e3 >= passes * 4 * found.numbers.trained


def test_faster_gpus_take_less(small):
    seconds = [plan(small).time(GPUS[name]).seconds for name in ("RTX 4080", "RTX 4090", "H100")]
    assert seconds == sorted(seconds, reverse=True)
