"""What is filled into a DeepSpeed configuration, and what is refused."""

import json

import pytest

from diffdpo.engine.ds_config import complete_ds_config, read_ds_config
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
        ({"train_micro_batch_size_per_gpu": "4"}, {}, "train_micro_batch_size_per_gpu to '4', the flags to 4"),
        ({"gradient_clipping": False}, {}, "gradient_clipping to False, the flags to 0.0"),
        ({}, {"bf16": True}, "stage 1"),
    ],
)
def test_contradictions_are_refused(given, place, said):
    with pytest.raises(UserError, match=said):
        complete_ds_config(given, OPTIONS, **PLACE | place)


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "stage is 0"),
        ({"zero_optimization": {"stage": 0}}, "leave --ds_config out for the plain engine"),
        ({"zero_optimization": {"stage": True}}, "stage is True; allowed: 1, 2, 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage is '2'"),
        ({"zero_optimization": None}, "must be an object"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
        (ZERO2 | {"fp16": {"enabled": "true"}}, "fp16.enabled is 'true'"),
        (ZERO2 | {"bf16": {"enabled": 1}}, "bf16.enabled is 1"),
        (ZERO2 | {"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop, which would change"),
        (ZERO2 | {"compression_training": {"weight_quantization": {}}}, "compression_training"),
        ({"zero_stage": 2, "offload_optimizer_device": "cpu"}, "'zero_stage', a name of accelerate's"),
        (ZERO2 | {"gradient_cliping": 1.0}, "'gradient_clipping' is meant?"),
        (ZERO2 | {"colour": "blue"}, "'colour', which DeepSpeed does not know; remove it"),
        (ZERO2 | {"wandb": {"enabled": 1}}, "wandb.enabled is 1"),
        (ZERO2 | {"timers": {"throughput": {"enabled": "no"}}}, "timers.throughput.enabled is 'no'"),
        (ZERO2 | {"bf16": {"enabled": True, "check_grad_overflow": True}}, "bf16 has 'check_grad_overflow'"),
        (ZERO2 | {"aio": {"block_size": "1M"}}, "aio.block_size is '1M'"),
        (ZERO2 | {"aio": {"queue_depth": 0}}, "aio.queue_depth is 0; write a whole number above 0"),
        (ZERO2 | {"aio": {"thread_count": 2}}, "aio has 'thread_count', which DeepSpeed does not read; allowed: block"),
        (ZERO2 | {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is True; any engine and number"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "elastic_checkpoint is not supported"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow is not supported"),
        ({"zero_optimization": {"stage": 3, "super_offload": True}}, "super_offload is not supported"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": ["cpu"]}}},
            "offload_optimizer.device is ['cpu']; allowed: none, cpu, nvme",
        ),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "cuts weights, which stage 2 does not"),
        (ZERO2 | {"gradient_predivide_factor": 0}, "a number above 0"),
        (ZERO2 | {"steps_per_print": 0}, "a whole number above 0"),
        (ZERO2 | {"seed": 42}, "sets seed, which DeepSpeed does not read; give --seed"),
        (ZERO2 | {"scheduler": {"type": "WarmupLR"}}, "sets a scheduler"),
        ([], "must hold a JSON object"),
        ({"zero_optimization": True}, "must be an object, found True"),
        ({"zero_optimization": {"stage": 2.0}}, "stage is 2.0"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "is an old name"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "the stage is 2"),
        (ZERO2 | {"bf16": True}, "bf16 must be an object"),
        (ZERO2 | {"activation_checkpointing": {"partition_activations": True}}, "give --gradient_checkpointing"),
        (ZERO2 | {"comms_logger": "on"}, "must be an object"),
        (ZERO2 | {"prescale_gradients": "false"}, "write true or false"),
        (ZERO2 | {"steps_per_print": "auto"}, "write a whole number"),
        (ZERO2 | {"steps_per_print": True}, "write a whole number"),
        (ZERO2 | {"data_types": {"grad_accum_dtype": "fp8"}}, "allowed: fp32, bf16"),
        (ZERO2 | {"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer has 'parms'"),
        (ZERO2 | {"optimizer": {"params": {"learning_rate": 1e-3}}}, "optimizer.params has 'learning_rate'"),
        (ZERO2 | {"optimizer": {"params": {"adam_w_mode": False}}}, "another optimizer"),
        (ZERO2 | {"optimizer": {"params": {"torch_adam": "true"}}}, "write true or false"),
    ],
)
def test_a_json_that_cannot_be_meant_is_one_line(content, said, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}', "'zero_optimization' stands twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' stands twice"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": Infinity}}', "Infinity is no finite number"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e400}}', "1e400 is no finite number"),
        ('{"zero_optimization": {"stage": 2} // two\n}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("zero_optimization:\n  stage: 2\n", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_a_text_that_json_would_guess_at_is_one_line(text, said, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("\ufeff" + json.dumps(ZERO2))
    assert read_ds_config(path) == ZERO2


def test_what_is_switched_off_may_stand(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO2 | {"amp": {"enabled": False}, "fp16": {"enabled": "auto"}}))
    assert read_ds_config(path)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("section", [{"comet": {"api_key": "sw0rdfish"}}, {"wandb": {"api_key": "sw0rdfish"}}])
def test_a_secret_is_refused_and_not_shown(tmp_path, section):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **section}))
    with pytest.raises(UserError, match="api_key, a secret") as caught:
        read_ds_config(path)
    assert "sw0rdfish" not in str(caught.value)
