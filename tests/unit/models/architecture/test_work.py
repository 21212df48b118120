"""The arithmetic of rows, against torch's own count of what a forward and a backward run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffdpo.models.architecture.work import ModelWork
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.scores.masked_log_probs import MaskedLogProbs

LENGTHS = torch.tensor([24, 24, 24])
SCORED = 12


@pytest.mark.parametrize("lora", [False, True])
def test_as_torch_counts_it(tiny_model, lora):
    loaded = load_model(str(tiny_model))
    loaded.model.requires_grad_(not lora)
    model = add_lora(loaded.model, loaded.spec, r=2, alpha=4) if lora else loaded.model
    module = MaskedLogProbs(model, loaded.spec)
    rows, positions = torch.arange(SCORED) // 4, 12 + torch.arange(SCORED) % 4
    inputs = (torch.ones(3, 24, dtype=torch.long), LENGTHS, rows, positions, torch.ones(SCORED, dtype=torch.long))
    attention = sdpa_kernel(SDPBackend.MATH)  # torch does not count the CPU's fused one
    with attention, FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    work = ModelWork.of(model)
    ours = work.of_rows(LENGTHS, SCORED, forwards=0)
    # below the first adapter nothing flows back
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.08 if lora else 1e-6)
    more = work.of_rows(LENGTHS, SCORED, forwards=1) - ours
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    assert more == pytest.approx(counter.get_total_flops(), rel=1e-6)
