import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdpo.models.architecture.layout import Layout, _varlen_usable

LENGTHS = [5, 9, 9, 1, 7]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_the_stream_once_and_waste_is_bounded(lengths, max_waste):
    width = max(lengths)
    layout = Layout.packed(lengths, width, max_waste=max_waste)
    stream = layout.index_N.tolist()
    assert len(stream) == len(set(stream)) == len(layout)
    real = {r * width + t for r, length in enumerate(lengths) for t in range(length)}
    assert real <= set(stream)
    assert len(stream) - len(real) <= max_waste * len(stream) + 1e-9
    for row, length in enumerate(lengths):
        start = int(layout.offset_R[row])
        assert stream[start : start + length] == [row * width + t for t in range(length)]
        assert layout.positions_N[start : start + length].tolist() == list(range(length))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("max_waste", [0.0, 0.3, 1.0])
def test_attention_of_a_row_ignores_its_neighbours(kv_heads, max_waste):
    generator = torch.Generator().manual_seed(0)
    layout = Layout.packed(LENGTHS, 9, max_waste=max_waste)
    q, k, v = (
        torch.randn(len(layout), heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    out = layout.attend(q, k, v)
    for row, length in enumerate(LENGTHS):
        part = slice(int(layout.offset_R[row]), int(layout.offset_R[row]) + length)
        kr, vr = (t[part].repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
        weights = torch.einsum("ihd,jhd->hij", q[part], kr).div(8**0.5).softmax(-1)
        alone = torch.einsum("hij,jhd->ihd", weights, vr).flatten(1)
        assert torch.allclose(out[part], alone, atol=1e-12)


def test_an_empty_row_counts_as_one_token_and_gives_no_nan():
    layout = Layout.padded([0, 3], 4)
    x = torch.ones(len(layout), 2, 4)
    assert layout.attend(x, x, x).isfinite().all()


@pytest.mark.parametrize("groups", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_varlen_call_means_the_same_attention(kv_heads, groups, monkeypatch):
    """The GPU kernel is replaced by a plain one of its documented meaning: what is tested is how it is called."""

    def plain_varlen(q, k, v, cuts_q, cuts_k, longest_q, longest_k, *, enable_gqa=False):
        assert cuts_q.dtype == torch.int32 and torch.equal(cuts_q, cuts_k)
        assert enable_gqa is (groups and kv_heads == 2)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if enable_gqa else t for t in (k, v))
        assert q.shape == k.shape and longest_q == longest_k == (cuts_q[1:] - cuts_q[:-1]).max()
        parts = []
        for start, stop in itertools.pairwise(cuts_q.tolist()):
            qr, kr, vr = (t[start:stop].transpose(0, 1) for t in (q, k, v))
            parts.append((qr @ kr.transpose(1, 2) / 8**0.5).softmax(-1) @ vr)
        return torch.cat(parts, dim=1).transpose(0, 1)

    layout = Layout.packed(LENGTHS, 9)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(layout), heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    per_bucket = layout.attend(q, k, v)
    monkeypatch.setattr("diffdpo.models.architecture.layout.varlen_attn", plain_varlen)
    monkeypatch.setattr("diffdpo.models.architecture.layout.VARLEN_GROUPS", groups)
    monkeypatch.setattr("diffdpo.models.architecture.layout._varlen_usable", lambda q: True)
    assert torch.allclose(layout.attend(q, k, v), per_bucket, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_torch_s_own_varlen_function_takes_the_call_and_has_its_backward(kv_heads):
    """On the meta device: names, dtypes and shapes are torch's to refuse, numbers there are none."""
    layout = Layout.packed(LENGTHS, 9, device="meta")
    q, k, v = (
        torch.empty(len(layout), heads, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    out = layout._attend_varlen(q, k, v)
    assert (out.shape, out.dtype) == ((len(layout), 32), torch.bfloat16)
    out.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in (q, k, v))


@pytest.mark.parametrize(
    ("dtype", "head_size", "on_gpu", "capability", "usable"),
    [
        (torch.bfloat16, 128, True, (8, 0), True),
        (torch.float16, 256, True, (9, 0), True),
        (torch.float32, 128, True, (8, 0), False),
        (torch.bfloat16, 20, True, (8, 0), False),
        (torch.bfloat16, 264, True, (8, 0), False),
        (torch.bfloat16, 128, True, (7, 5), False),
        (torch.bfloat16, 128, False, (8, 0), False),
    ],
)
def test_where_the_varlen_kernel_is_used(dtype, head_size, on_gpu, capability, usable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(dtype=dtype, shape=(7, 4, head_size), device=torch.device("cuda:0" if on_gpu else "cpu"))
    assert _varlen_usable(q) == usable
