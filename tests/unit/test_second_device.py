"""The second device catches what a GPU would: a test of the tool itself."""

import gc

import pytest
import torch

from tests.second_device import AWAY, MEMORY, second_device


@pytest.fixture
def there():
    with second_device() as kind:
        yield kind


def put(into: torch.Tensor, place, values: torch.Tensor) -> None:
    into[place] = values


def host() -> torch.Tensor:
    return torch.ones(3)


MIXED = {
    "a sum": lambda x: x + host(),
    "a choice": lambda x: torch.where(x > 0, x, host()),
    "one of several": lambda x: torch.cat([x, host()]),
    "numbers that are stacked": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "changed in place": lambda x: host().add_(x),
    "a number changed in place": lambda x: torch.zeros(()).add_(x.sum()),
    "out=": lambda x: torch.add(x, x, out=host()),
    "out= of a number": lambda x: torch.add(x.sum(), 1, out=torch.zeros(())),
    "indexed by the other": lambda x: host()[x.long()],
    "put by index": lambda x: put(x, torch.tensor([0, 1]), torch.ones(2)),
    "put by mask": lambda x: put(x, x > 1, torch.ones(2)),
    "put by index, out of place": lambda x: x.index_put((torch.tensor([0, 1]),), torch.ones(2)),
    "put into the host": lambda x: put(host(), x > 1, x[:2]),
    "gathered": lambda x: x.gather(0, torch.tensor([0, 1])),
    "selected by a number": lambda x: x.index_select(0, torch.tensor(1)),
    "masked by the host": lambda x: x.masked_fill(torch.tensor([True, False, True]), 0),
    "weights": lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
}


@pytest.mark.parametrize("mistake", MIXED)
def test_mixing_fails(there, mistake):
    with pytest.raises(RuntimeError, match="on the same device, but the host has"):
        MIXED[mistake](torch.arange(3.0, device=AWAY))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, **how: torch.rand(3, device=AWAY, **how),
        lambda x, **how: torch.randperm(3, device=AWAY, **how),
        lambda x, **how: torch.multinomial(x, 2, **how),
        lambda x, **how: x.uniform_(**how),
    ],
)
def test_a_generator_of_the_host_draws_nothing_there(there, draw):
    with pytest.raises(RuntimeError, match="device type for generator but found 'cpu'"):
        draw(torch.ones(3, device=AWAY), generator=torch.Generator())
    assert draw(torch.ones(3, device=AWAY)).device == AWAY
    assert torch.rand(3, generator=torch.Generator()).to(AWAY).device == AWAY


def test_reading_as_numpy_fails(there):
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device=AWAY).numpy()
    assert torch.ones(3, device=AWAY).cpu().numpy().sum() == 3


def test_what_a_gpu_allows_is_allowed(there):
    x = torch.arange(4.0, device=AWAY)
    assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
    assert x[torch.tensor([2, 3])].tolist() == [2, 3]
    y = x.clone()
    y[torch.tensor([0, 1])] = x[2:]
    y[torch.tensor([2])] = torch.tensor(7.0)
    y[3:] = torch.ones(1)  # a copy
    assert y.tolist() == [2, 3, 7, 1]
    assert x.masked_fill(x > 1, torch.tensor(0.0)).tolist() == [0, 1, 0, 0]
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
