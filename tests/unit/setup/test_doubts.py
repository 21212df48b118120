"""What is allowed and likely a mistake is told in a line; what cannot be meant is refused in the flags' own words."""

import pytest

from diffdpo.config import SftConfig, TrainConfig, make_config
from diffdpo.errors import UserError
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
    (line,) = doubts(TrainConfig(**{"warmup_steps": 0, **settings}), steps=30)
    assert said in line


def test_usual_settings_are_not_doubted():
    for beta in (0.01, 0.1, 2.0, 10.0):
        assert doubts(TrainConfig(learning_rate=1e-4, beta=beta, warmup_steps=30), steps=30) == []
    assert doubts(SftConfig(), steps=100) == []


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
