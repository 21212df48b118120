"""DeepSpeed's Adam on the host after a load: to the bit as if it had never stopped."""

import copy

import pytest
import torch

from diffdpo.engine.adam_clock import wind_up
from diffdpo.engine.operator_cache import use_kept

STEPS, MORE = 37, 11


def make(kind: str):
    from diffdpo.engine.deepspeed import import_deepspeed

    import_deepspeed()
    use_kept({"cpu": ["cpu_adam"], "fused": ["fused_adam"]}[kind])  # else it is compiled for this test alone
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    weight = torch.nn.Parameter(torch.linspace(-1, 1, 257))
    made = {"cpu": DeepSpeedCPUAdam, "fused": FusedAdam}[kind]
    return weight, made([weight], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)


def take_steps(weight, optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        weight.grad = torch.sin(torch.arange(257) * 0.1 * step) * 0.1
        optimizer.step()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wound", [True, False], ids=["wound up", "not"])
def test_a_resumed_adam_is_the_uninterrupted_one_to_the_bit(kind, wound):
    if torch.cuda.is_available():
        pytest.skip("the GPU's Adam keeps no running product")
    weight, optimizer = make(kind)
    take_steps(weight, optimizer, 1, STEPS)
    saved, state = weight.detach().clone(), optimizer.state_dict()
    state = copy.deepcopy(state)
    take_steps(weight, optimizer, STEPS + 1, MORE)
    other, resumed = make(kind)
    if kind == "fused":  # its C++ object is one for the process: a new process's knows nothing
        _forget(resumed)
    other.data.copy_(saved)
    resumed.load_state_dict(state)
    if wound:
        wind_up(resumed)
    take_steps(other, resumed, STEPS + 1, MORE)
    assert torch.equal(other, weight) is wound, "and without it they must differ, or this test means nothing"


def _forget(optimizer) -> None:
    """Take the one object far from where it was."""
    nothing = [[torch.zeros(1)] for _ in range(4)]
    optimizer.multi_tensor_adam(
        65536, torch.zeros(1, dtype=torch.int32), nothing, 0.0, 0.9, 0.95, 1.0, 9999, optimizer.adam_w_mode, 1, 0.0
    )
