"""The second device catches what a GPU would: a test of the tool itself."""

import gc

import pytest
import torch

from tests.second_device import AWAY, MEMORY, second_device


@pytest.fixture
def there():
    with second_device() as kind:
        yield kind


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.ones(3)[x.long()],
        lambda x: torch.nn.Linear(3, 3)(x),
    ],
)
def test_mixing_fails(there, mistake):
    with pytest.raises((RuntimeError, TypeError)):
        mistake(torch.ones(3, device=AWAY))


def test_reading_as_numpy_fails(there):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device=AWAY).numpy()
    assert torch.ones(3, device=AWAY).cpu().numpy().sum() == 3


def test_what_a_gpu_allows_is_allowed(there):
    x = torch.arange(4.0, device=AWAY)
    assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
    assert x[torch.tensor([2, 3])].tolist() == [2, 3]
    assert float(x.sum()) == 6 and x.device == AWAY and x.cpu().device.type == "cpu"
    assert torch.tensor([1, 2], device=AWAY).device == AWAY
    host = torch.zeros(4)
    host.copy_(x)
    assert host.tolist() == [0, 1, 2, 3]


def test_gradients_and_an_optimizer(there):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    wanted = torch.autograd.grad(layer(torch.ones(1, 3)).square().sum(), layer.weight)[0]
    away = torch.nn.Linear(3, 2)
    away.load_state_dict(layer.state_dict())
    away.to(AWAY)
    away(torch.ones(1, 3, device=AWAY)).square().sum().backward()
    assert away.weight.grad.device == AWAY and torch.equal(away.weight.grad.cpu(), wanted)
    before = away.weight.detach().cpu().clone()
    torch.optim.AdamW(away.parameters(), lr=0.1, fused=True).step()
    assert not torch.equal(away.weight.detach().cpu(), before)


def test_memory_is_counted_by_storage(there):
    gc.collect()  # circles of other tests of this process would be taken away in between
    before = MEMORY.now
    x = torch.zeros(1000, device=AWAY)
    view = x[:10]
    assert MEMORY.now - before == 4000
    del x
    assert MEMORY.now - before == 4000
    del view
    assert MEMORY.now == before
