"""Two ways to hide keys of later blocks: they must mean one thing."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from diffdpo.errors import UserError
from diffdpo.models.architecture import block_attention
from diffdpo.models.architecture.block_attention import LAST, Visibility, check_flex, hidden_attention


def rows_over_clean(clean, width, block):
    """Noisy tokens of blocks that start behind `clean` clean ones, which they see but for their own block's."""
    query_S = torch.arange(clean - block, clean - block + width) // block
    clean_K = torch.arange(clean) // block
    return Visibility(query_S, torch.cat([clean_K + 1, query_S]), torch.cat([torch.full_like(clean_K, LAST), query_S]))


def test_a_key_is_seen_by_the_blocks_it_names():
    seen = rows_over_clean(4, 4, 2).dense().int().tolist()
    # clean blocks 0, 0, 1, 1, then the row's own 1, 1, 2, 2
    assert seen == [
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("groups", [4, 2])
def test_compiled_flex_attention_is_the_masks(groups, monkeypatch):
    # torch 2.13's kernels for lengths that are left open are no C++ on a CPU: there every length is compiled for itself
    kernel = torch.compile(flex.flex_attention, dynamic=False)
    monkeypatch.setattr(block_attention, "compiled_flex", lambda: kernel)
    torch.manual_seed(0)
    for clean, width, rows in ((64, 96, 1), (256, 160, 3)):
        seen = rows_over_clean(clean, width, 4)
        q = torch.randn(rows, width, 4, 16)
        k, v = torch.randn(2, rows, clean + width, groups, 16)
        by_mask = hidden_attention(q, k, v, seen.dense())
        by_rule = hidden_attention(q, k, v, seen.rule())
        assert (by_mask - by_rule).abs().max() <= 2e-6


def test_no_call_is_the_uncompiled_one(monkeypatch):
    """Sizes of one, of one tile and of several are graphs of their own, with gradient or without: more than torch's
    limit of eight."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    block_attention.compiled_flex.cache_clear()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without torch.compile.*")
        for grad, clean, width, rows in itertools.product((False, True), (4, 160), (4, 160), (1, 2, 3)):
            q, k, v = (torch.randn(rows, n, 2, 8) for n in (width, clean + width, clean + width))
            q.requires_grad_(grad)
            hidden_attention(q, k, v, rows_over_clean(clean, width, 4).rule())
    block_attention.compiled_flex.cache_clear()


def test_where_it_cannot_train_or_has_nothing_to_do():
    with pytest.raises(UserError, match="no backward on a CPU"):
        check_flex(torch.device("cpu"), block_size=4)
    with pytest.raises(UserError, match="block-causal models"):
        check_flex(torch.device("cuda"), block_size=None)
