"""Which reference is used, and what is refused before anything is opened."""

import pytest

from diffdpo.config import TrainConfig
from diffdpo.engine.choice import DEEPSPEED, EngineChoice
from diffdpo.engine.sharding import Sharding
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.reference.modes import check_reference, choose_mode, second_model_share


@pytest.mark.parametrize(
    ("settings", "share", "mode"),
    [
        ({}, 0.01, "copy"),
        ({}, 0.4, "precomputed"),
        ({"reference": "copy"}, 0.4, "copy"),
        ({"loss_type": "kto"}, 0.4, "copy"),
        ({"use_peft": True}, 0.4, "adapter_off"),
        ({"use_peft": True, "ref_model_name_or_path": "x"}, 0.4, "precomputed"),
        ({"use_peft": True, "reference_cache": "x"}, 0.01, "precomputed"),
        ({"reference_cache": "x"}, 0.01, "precomputed"),
        ({"loss_type": "simpo"}, 0.4, "none"),
        ({"loss_type": "simpo", "reference": "none"}, 0.4, "none"),
        ({"reference": "none"}, 0.4, "none"),
    ],
)
def test_auto(settings, share, mode):
    config = TrainConfig(**settings)
    found, why = choose_mode(config, config.loss(), share=lambda: share)
    assert found == mode and why and "\n" not in why


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reference": "precomputed", "loss_type": "kto"}, "mismatched answers"),
    ],
)
def test_a_reference_that_cannot_serve_is_refused(settings, said):
    config = TrainConfig(**settings)
    with pytest.raises(UserError, match=said) as caught:
        check_reference(config, config.loss())
    assert "\n" not in str(caught.value)


def test_the_share_of_a_second_model(tiny_model, monkeypatch):
    import torch

    size = (tiny_model / "model.safetensors").stat().st_size
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"total": 4 * size}))
    world = World(0, 0, 2, torch.device("cpu"))
    config = TrainConfig(model_name_or_path=str(tiny_model))
    assert second_model_share(config, EngineChoice(processes=2), world) == 0.25
    sharded = EngineChoice(DEEPSPEED, processes=2, sharding=Sharding(True, True, True))
    assert second_model_share(config, sharded, world) == 0.125
