"""The ledger's bytes and operations, where they can be worked out by hand."""

import torch
from torch import nn

from diffdpo.planner.trace import Ledger


def test_live_bytes_and_flops_of_a_product():
    x = torch.empty(10, 100, device="meta")
    ledger = Ledger(lambda tensor: "all")
    ledger.given([x])
    with ledger:
        y = x @ x.T  # 400 bytes
        z = y + 1  # 400 more
        del y
        w = z.t()  # a view
        del z
        v = w * 2
        del w, v
    assert ledger.trace.peak == 800 and not ledger.trace.left
    assert ledger.trace.flops == 2 * 10 * 100 * 10


def test_what_autograd_keeps_and_gradients():
    linear = nn.Linear(100, 50, bias=False, device="meta")
    x = torch.empty(8, 100, device="meta")
    ledger = Ledger(lambda tensor: "gradients" if tuple(tensor.shape) in ((50, 100), (100, 50)) else "rest")
    ledger.given([*linear.parameters(), x])
    with ledger:
        out = linear(x).relu().sum()
        out.backward()
        del out
    assert ledger.trace.left["gradients"] == 4 * 50 * 100
    assert ledger.trace.flops == 2 * 2 * 8 * 100 * 50  # forward and the weight's gradient; x needs none


def test_peak_holds_what_was_live_at_once():
    ledger = Ledger(lambda tensor: str(tensor.shape[0]))
    with ledger:
        a = torch.empty(256, dtype=torch.uint8, device="meta")
        b = torch.empty(512, dtype=torch.uint8, device="meta")
        del a
        c = torch.empty(128, dtype=torch.uint8, device="meta")
        del b, c
    assert ledger.trace.at_peak == {"256": 256, "512": 512}
