"""The records of a step stay, whatever the number of processes."""

import pytest

from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.settings.engine import over_processes


@pytest.mark.parametrize(
    ("processes", "micro", "accumulation"),
    [(1, 4, 6), (2, 4, 3), (3, 4, 2), (4, 3, 2), (6, 4, 1), (8, 3, 1), (24, 1, 1)],
)
def test_micro_batches_follow(processes, micro, accumulation):
    config = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=7, global_batch_size=24)
    found = over_processes(config, processes)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (micro, accumulation)
    assert micro * accumulation * processes == 24


def test_refused_and_left_alone():
    with pytest.raises(UserError, match="5 processes"):
        over_processes(TrainConfig(global_batch_size=24), 5)
    plain = TrainConfig(gradient_accumulation_steps=7)
    assert over_processes(plain, 5) is plain
