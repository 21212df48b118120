import pytest
import torch

from diffdpo.sampling.confidence import ORDERS, choose, gumbel_argmax


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


def published_by_dream(logits, token, temperature, order):
    """`sample_tokens` of Dream's generation_utils, for tokens that are drawn already."""
    p = (logits / temperature if temperature > 0 else logits).softmax(-1)
    if order == "top_margin":
        first, second = p.sort(dim=-1, descending=True).values[:, :2].T
        return first - second
    if order == "entropy":
        return (p * (p + 1e-10).log()).sum(-1)
    return p.gather(-1, token[:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("order", ORDERS)
def test_confidences_are_those_of_the_published_samplers(order, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator, dtype=torch.float64) * 3
    uniforms = torch.rand(50, 9, generator=generator, dtype=torch.float64)
    token, confidence = choose(logits, uniforms.clone, temperature=temperature, order=order)
    if order == "low_confidence":  # LLaDA's generate.py: of the untempered softmax
        expected = logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1)
    else:
        expected = published_by_dream(logits, token, temperature, order)
    assert torch.allclose(confidence, expected, atol=1e-8)
