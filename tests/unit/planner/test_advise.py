"""Advice is a setting that was tried: it fits, and no gentler one is needed."""

import json

import pytest

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.planner import advise as module
from diffdpo.planner.advise import advise
from diffdpo.planner.hardware import Host
from diffdpo.planner.memory import DEVICE
from diffdpo.planner.plan import Machine, make_plan
from tests.support.paths import ROOT


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


def test_inputs_of_layers_go_to_the_host_before_anything_that_changes_the_training(small, monkeypatch):
    """One row of a segment is the least: what is left to move are its layers' inputs."""
    monkeypatch.chdir(ROOT)
    least = {"segment_rows": 1, "gradient_checkpointing": True, "segmentation": "two_pass", "reference": "precomputed"}
    least |= {"max_length": 4096, "max_prompt_length": 4000, "per_device_train_batch_size": 1}
    kept, away = (planned(small, 2**40, **least, activation_offload=way) for way in ("none", "cpu"))
    assert away.need(DEVICE) < kept.need(DEVICE)
    advice = advise(planned(small, (away.need(DEVICE) + kept.need(DEVICE)) // 2, **least))
    assert advice is not None and advice.change == {"activation_offload": "cpu"}


def test_nothing_helps_a_gpu_that_cannot_hold_cuda_itself(small, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert advise(planned(small, 2**28)) is None


def test_the_project_s_ds_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        named = [change["ds_config"] for tier in module._tiers(TrainConfig()) for change in tier if change]
        assert len(named) == 5 and all((folder / name).is_file() for name in named)
        assert all(name.startswith("ds_configs/") for name in named) == (folder == ROOT)


def test_a_missing_file_is_no_verdict(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DS_CONFIGS", tmp_path)
    with pytest.raises(UserError, match="is not there, so no advice can be tried"):
        advise(planned(small, 2**28))


def test_a_change_that_is_refused_stands_in_no_other_s_way(small, tmp_path):
    """The JSON fixes fp32 and the micro-batch: smaller segments alone are enough."""
    path = tmp_path / "ds.json"
    fixed = {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    path.write_text(json.dumps(fixed))
    plenty = planned(small, 2**40, ds_config=str(path), segmentation="none")
    advice = advise(planned(small, 0.9 * plenty.need(DEVICE), ds_config=str(path), segmentation="none"))
    assert advice is not None and "ds_config" not in advice.change and "bf16" not in advice.change
