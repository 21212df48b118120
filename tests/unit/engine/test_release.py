"""Letting go of a frozen model: what DeepSpeed still refers to holds no weights."""

import torch
from torch import nn

from diffdpo.engine.deepspeed import ShardedFrozen
from diffdpo.engine.plain import PlainFrozen


class Engine:
    """As `deepspeed.initialize` leaves a ZeRO-3 module: a shard beside each parameter."""

    def __init__(self):
        self.module, self.destroyed = nn.Linear(8, 8, dtype=torch.bfloat16), False
        for parameter in self.module.parameters():
            parameter.ds_tensor = torch.ones(4, dtype=parameter.dtype)

    def destroy(self):
        self.destroyed = True


def test_a_sharded_model_s_weights_are_freed():
    frozen = ShardedFrozen.__new__(ShardedFrozen)
    frozen.engine = engine = Engine()
    kept = list(engine.module.parameters())
    frozen.release()
    assert engine.destroyed
    assert all(p.numel() == 0 and p.ds_tensor.numel() == 0 and p.ds_tensor.dtype == p.dtype for p in kept)


def test_a_plain_model_is_let_go_of_and_left_as_it_is():
    module = nn.Linear(2, 2)
    frozen = PlainFrozen(module, torch.device("cpu"))
    assert frozen(torch.ones(1, 2)).shape == (1, 2)
    frozen.release()
    assert frozen.module is None and module.weight.numel() == 4
