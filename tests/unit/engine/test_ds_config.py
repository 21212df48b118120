"""What is filled into a DeepSpeed configuration, and what is refused."""

import pytest

from diffdpo.engine.ds_config import complete_ds_config
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.errors import UserError

OPTIONS = OptimizerOptions(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.0)
PLACE = {"micro_batch_size": 4, "accumulation_steps": 2, "world_size": 3, "bf16": False, "cuda": False}


def test_ours_is_filled_in():
    config = complete_ds_config({"zero_optimization": {"stage": 2}}, OPTIONS, **PLACE)
    assert config["train_batch_size"] == 24 and config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.0, "DeepSpeed clips at 1.0 unless told otherwise"
    assert config["optimizer"]["params"]["lr"] == 1e-3 and config["bf16"] == {"enabled": False}


def test_auto_means_ours_and_the_given_configuration_stays_as_it_is():
    given = {"gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
    config = complete_ds_config(given, OPTIONS, **PLACE)
    assert config["gradient_clipping"] == 0.0 and config["optimizer"]["params"]["torch_adam"] is True
    assert given["gradient_clipping"] == "auto" and "lr" in given["optimizer"]["params"]


def test_page_locked_memory_is_for_gpus():
    given = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    assert not complete_ds_config(given, OPTIONS, **PLACE)["zero_optimization"]["offload_optimizer"]["pin_memory"]
    on_gpu = complete_ds_config(given, OPTIONS, **PLACE | {"cuda": True})
    assert on_gpu["zero_optimization"]["offload_optimizer"]["pin_memory"]


@pytest.mark.parametrize(
    ("given", "place", "said"),
    [
        ({"train_batch_size": 7}, {}, "train_batch_size"),
        ({"fp16": {"enabled": True}}, {}, "fp16"),
        ({"optimizer": {"type": "Lion"}}, {}, "Lion"),
        ({"optimizer": {"params": {"lr": 0.01}}}, {}, r"optimizer.params.lr to 0.01, the flags to 0.001"),
        ({"optimizer": {"params": {"betas": [0.8, 0.99]}}}, {}, r"optimizer.params.betas"),
        ({}, {"bf16": True}, "stage 1"),
    ],
)
def test_contradictions_are_refused(given, place, said):
    with pytest.raises(UserError, match=said):
        complete_ds_config(given, OPTIONS, **PLACE | place)
