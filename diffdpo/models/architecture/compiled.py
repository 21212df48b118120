"""Blocks through torch.compile: norms, rotary positions and SwiGLU become a few passes over memory instead of many.

Attention stays outside. How many lengths there are in a forward changes from one to the next, and inside the graph each
number of them would be compiled anew, for minutes; outside, a block is two graphs that serve all of them.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor, nn

from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import RowLayout, RunBlock, call_block

GRAPHS = 64
"""Of one block: with and without gradient, adapter on and off, last or not, frozen or trained; torch stops at 8."""


class AttentionOutside:
    """A layout whose attention a compiler does not look into."""

    def __init__(self, layout: RowLayout):
        self.layout, self.positions_N, self.max_length = layout, layout.positions_N, layout.max_length

    def at(self, layer: int) -> "AttentionOutside":
        """The layout as a layer sees it, its attention outside as here."""
        own = self.layout.at(layer)
        return self if own is self.layout else AttentionOutside(own)

    @torch.compiler.disable
    def attend(self, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        return self.layout.attend(q_NHD, k_NGD, v_NGD)


def check_compiler() -> None:
    """UserError where torch.compile finds nothing to compile with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("--torch_compile finds no C++ compiler; install g++, or leave it out") from None
    if torch.cuda.is_available() and not importlib.util.find_spec("triton"):
        raise UserError("--torch_compile finds no triton for the GPU: pip install triton, or leave it out")


@cache
def compiled_call() -> RunBlock:
    """`call_block`, compiled at the first call of each kind, once for all blocks and all numbers of tokens."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return torch.compile(call_block, dynamic=True)


def call_compiled(block: nn.Module, *args) -> Tensor:
    """As `call_block`."""
    return compiled_call()(block, *args)
