"""Advice is a setting that was tried: it fits, and no gentler one is needed."""

from diffdpo.config import TrainConfig
from diffdpo.plan.advise import advise
from diffdpo.plan.hardware import GPUS, Host
from diffdpo.plan.memory import DEVICE
from diffdpo.plan.plan import Machine, make_plan
from tests.conftest import ROOT


def planned(path: str, memory: float, **settings):
    from dataclasses import replace

    gpu = replace(GPUS["RTX 4080"], memory=int(memory))
    flags = {"max_length": 64, "max_prompt_length": 32, "num_mc_samples": 16} | settings
    config = TrainConfig(model_name_or_path=path, **flags)
    return make_plan(config, Machine(gpu, Host(2**36)), timed=False)


def test_segments_before_anything_that_changes_the_training(small, monkeypatch):
    monkeypatch.chdir(ROOT)
    plenty = planned(small, 2**40, segmentation="none")
    tight = planned(small, 0.9 * plenty.need(DEVICE), segmentation="none")
    advice = advise(tight)
    assert advice is not None and not advice.plan.short()
    assert "use_peft" not in advice.change and "ds_config" not in advice.change


def test_nothing_helps_a_gpu_that_cannot_hold_cuda_itself(small, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert advise(planned(small, 2**28)) is None
