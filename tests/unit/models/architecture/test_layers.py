import importlib.util

import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.models.architecture import token_log_probs as head_module
from diffdpo.models.architecture.layers import RMSNorm, RotaryTable, VocabularyHead, rotate
from diffdpo.models.architecture.token_log_probs import check_liger, token_log_probs


def test_hand_written_backwards_of_norm_and_rotation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, 1e-5).double()
    cos, sin = RotaryTable(8, 100.0)(torch.arange(6), 6, torch.float64)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), (x,))


def test_rotary_table_grows_and_stays_the_same():
    table = RotaryTable(8, 100.0)
    short = table(torch.arange(3), 3, torch.float32)[0].clone()
    assert torch.equal(table(torch.arange(50), 50, torch.float32)[0][:3], short)


def test_norm_rounds_before_the_weight_as_published():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    norm = RMSNorm(64, 1e-6).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    wide = x.float()
    expected = norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_norm_is_the_function_that_gpus_call(dtype, tolerance):
    """On a GPU `torch.nn.functional.rms_norm` does it (here on the CPU, where it is slow)."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    ours, theirs = RMSNorm(64, 1e-6).to(dtype)(x), torch.nn.functional.rms_norm(x, (64,), None, 1e-6)
    assert torch.allclose(ours, theirs, rtol=0, atol=tolerance)
    upstream = torch.linspace(-1, 1, 256).reshape(4, 64).to(dtype)
    gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=max(tolerance, torch.finfo(dtype).eps * 4))


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("count", [0, 7])
def test_chunked_head_equals_full_log_softmax(rows, train_head, count):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(count, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=train_head)
    target = torch.randint(0, 11, (count,), generator=generator)
    scale = torch.randn(count, generator=generator, dtype=torch.float64)
    leaves = [hidden, weight] if train_head else [hidden]
    ours = token_log_probs(hidden, weight, target, logits_budget=rows * 11 * 8)
    full = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    assert torch.allclose(ours, full, atol=1e-12)
    expected = torch.autograd.grad((full * scale).sum(), leaves)
    for a, b in zip(torch.autograd.grad((ours * scale).sum(), leaves), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_no_matrix_above_the_budget_is_made():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[-1] == 1000:
                largest = max(largest, out.numel() * out.element_size())
            return out

    hidden = torch.randn(64, 4, requires_grad=True)
    head = VocabularyHead(4, 1000)
    target = torch.zeros(64, dtype=torch.long)
    with Watch():
        head(hidden, target, logits_budget=8 * 1000 * 4).sum().backward()
    assert 0 < largest <= 8 * 1000 * 4


def test_extreme_logits_do_not_overflow():
    weight = torch.tensor([[300.0], [-300.0]])
    logp = token_log_probs(torch.ones(2, 1), weight, torch.tensor([0, 1]), logits_budget=None)
    assert logp.tolist() == [0.0, -600.0]


class FirstTokensGradient(torch.autograd.Function):
    """Right losses, every gradient weighted as the first token's: what liger-kernel did until July 2026."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits.softmax(-1), target)
        return logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, p, target = ctx.saved_tensors
        logits = (torch.nn.functional.one_hot(target, p.shape[1]) - p) * upstream[0]
        return logits @ weight, logits.T @ hidden, None


def test_a_liger_kernel_with_other_numbers_is_refused(monkeypatch):
    plain = lambda h, w, t: (h @ w.T).log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)  # noqa: E731
    monkeypatch.setattr(head_module, "liger_log_probs", plain)
    check_liger("cpu")
    check_liger("cpu", torch.bfloat16)
    monkeypatch.setattr(head_module, "liger_log_probs", FirstTokensGradient.apply)
    with pytest.raises(UserError, match="gives other gradients"):
        check_liger("cpu")
    monkeypatch.setattr(head_module, "liger_log_probs", lambda h, w, t: plain(h, w, t) * 1.1)
    with pytest.raises(UserError, match="gives other scores"):
        check_liger("cpu")
    only_wide = lambda h, w, t: plain(h, w, t) * (1 if h.dtype == torch.float32 else torch.nan)  # noqa: E731
    monkeypatch.setattr(head_module, "liger_log_probs", only_wide)
    with pytest.raises(UserError, match=r"off by nan in torch\.bfloat16"):
        check_liger("cpu", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_liger_s_own_kernel_passes_the_check_in_triton_s_interpreter(command, python):
    """The kernel itself on the CPU, as far as it goes without a GPU: numbers and gradients, not speed."""
    module = "diffdpo.models.architecture.token_log_probs"
    check = f"from {module} import check_liger as c; import torch; c('cpu', torch.bfloat16)"
    done = command([python, "-c", check], timeout=300, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
