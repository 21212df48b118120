"""What is allowed and likely a mistake is told in a line; what cannot be meant is refused in the flags' own words."""

import pytest

from diffdpo.config import SftConfig, TrainConfig, make_config
from diffdpo.engine.choice import EngineChoice, deepspeed_choice
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.errors import UserError
from diffdpo.settings.engine import accumulation_passed_over, over_processes
from diffdpo.setup.accelerate_options import passed_over
from diffdpo.setup.preflight import doubts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 0.0}, "--learning_rate is 0: nothing is learned"),
        ({"learning_rate": 1e-4, "warmup_steps": 31}, "--warmup_steps 31 is longer than the run of 30 steps"),
        ({"learning_rate": 1e-4, "beta": 1e8}, "--beta 1e+08 multiplies log-ratios"),
    ],
)
def test_doubts(settings, said):
    (line,) = doubts(TrainConfig(**{"warmup_steps": 0, **settings}), EngineChoice(), steps=30)
    assert said in line


def test_usual_settings_are_not_doubted():
    for beta in (0.01, 0.1, 2.0, 10.0):
        assert doubts(TrainConfig(learning_rate=1e-4, beta=beta, warmup_steps=30), EngineChoice(), steps=30) == []
    assert doubts(SftConfig(), EngineChoice(), steps=100) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 100}, "--vocab_size is 100; it must be at least 259"),
        ({"width": 130, "heads": 4}, "must be an even number for each head, such as --width 128"),
        ({"width": 12, "heads": 4}, "the width must be an even number for each head, such as --width 16"),
        ({"answer_canvas": 5000}, r"--answer_canvas 5000: .* 512 tokens of --max_length 1024"),
    ],
)
def test_sizes_of_supervised_training(settings, said):
    with pytest.raises(UserError, match=said):
        make_config(SftConfig, settings)


def test_sizes_that_do():
    make_config(SftConfig, {"answer_canvas": 512, "vocab_size": 259, "width": 6, "heads": 3})
    make_config(SftConfig, {"model_name_or_path": "x", "heads": 5})  # of no new model


def test_two_weights_of_0_are_refused():
    both = {"desirable_weight": 0.0, "undesirable_weight": 0.0}
    for loss in ("kto", "apo_zero_unpaired"):
        with pytest.raises(UserError, match="both 0: the loss would be 0"):
            make_config(TrainConfig, {"loss_type": loss, **both})
        make_config(TrainConfig, {"loss_type": loss, **both, "desirable_weight": 1.0})


def deepspeed():
    sizes = {"micro_batch_size": 1, "accumulation_steps": 1}
    return deepspeed_choice({"zero_optimization": {"stage": 3}}, OptimizerOptions(1e-4), **sizes)


def test_what_accelerate_s_file_says_beside_the_flags():
    config, fsdp = TrainConfig(engine="fsdp2"), {"ACCELERATE_USE_FSDP": "true"}
    nothing = {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"}
    assert passed_over(config, EngineChoice(), {}) == passed_over(config, EngineChoice(), fsdp | nothing) == []
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    (line,) = passed_over(config, EngineChoice(), fsdp | asked)
    assert all(f"{name} {value}" in line for name, value in asked.items())
    same = TrainConfig(engine="fsdp2", fsdp_cpu_offload=True, fsdp_reshard_after_forward=False)
    (line,) = passed_over(same, EngineChoice(), fsdp | asked)
    assert "ACCELERATE_MIXED_PRECISION" in line and "OFFLOAD" not in line
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    zero |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}
    (line,) = passed_over(TrainConfig(), deepspeed(), zero)
    assert "ZERO_STAGE 2" in line and "STEPS 7" in line and "PARAM_DEVICE" not in line


def test_an_accumulation_that_the_global_batch_size_decides_against_is_told():
    asked = TrainConfig(global_batch_size=12, per_device_train_batch_size=4, gradient_accumulation_steps=5)
    (line,) = accumulation_passed_over(asked, over_processes(asked, 1))
    assert "--gradient_accumulation_steps 5 is passed over" in line and "has 3 micro-batches of 4" in line
    for steps, size in ((3, 12), (1, 12), (5, 0)):
        one = TrainConfig(global_batch_size=size, per_device_train_batch_size=4, gradient_accumulation_steps=steps)
        assert accumulation_passed_over(one, over_processes(one, 1)) == []
