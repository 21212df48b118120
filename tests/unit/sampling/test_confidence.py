import torch

from diffdpo.sampling.confidence import ORDERS, gumbel_argmax


def test_gumbel_argmax_samples_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(60_000, 3)
    generator = torch.Generator().manual_seed(0)
    token = gumbel_argmax(logits, 0.7, lambda: torch.rand(60_000, 3, generator=generator, dtype=torch.float64))
    frequency = torch.bincount(token, minlength=3) / len(token)
    assert torch.allclose(frequency, (logits[0] / 0.7).softmax(-1), atol=0.008)


def test_temperature_zero_draws_nothing():
    assert gumbel_argmax(torch.tensor([[1.0, 3.0]]), 0, lambda: 1 / 0).tolist() == [1]


def test_orders_on_a_worked_example():
    p = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.4, 0.2, 0.2, 0.2]])
    token = torch.tensor([0, 0])
    assert torch.allclose(ORDERS["low_confidence"](p, token), torch.tensor([0.5, 0.4]))
    assert torch.allclose(ORDERS["top_margin"](p, token), torch.tensor([0.1, 0.2]))
    assert torch.allclose(ORDERS["entropy"](p, token), torch.tensor([-0.9433, -1.3322]), atol=1e-4)
