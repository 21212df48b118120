"""Grouped products against the loop over experts: the same outputs and gradients, on the CPU, which has both."""

import pytest
import torch
from torch import nn

from diffdpo.models.architecture import experts as mixing
from diffdpo.models.architecture.experts import mix_experts
from diffdpo.models.architecture.llada2_moe import Expert

N, K, WIDTH, E, T = 21, 16, 24, 6, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(Expert(K, WIDTH) for _ in range(E))


def run(block, way, monkeypatch, dtype=torch.float32):
    """Output and gradients, of the input and of what is trained."""
    monkeypatch.setattr(mixing, "grouped_products", lambda h_NK: way == "grouped")
    generator = torch.Generator().manual_seed(1)
    h_NK = torch.randn(N, K, generator=generator).to(dtype).requires_grad_()
    expert_NT = torch.stack([torch.randperm(E - 1, generator=generator)[:T] for _ in range(N)])  # the last has none
    weight_NT = torch.rand(N, T, generator=generator).requires_grad_()
    block.zero_grad()
    out_NK = mix_experts(h_NK, block.experts, expert_NT, weight_NT)
    (out_NK * torch.linspace(-1, 1, K)).sum().backward()
    gradients = [p.grad.clone() for p in block.parameters() if p.requires_grad]
    return [out_NK.detach(), h_NK.grad, weight_NT.grad, *gradients]


def agree(block, monkeypatch, tolerance, dtype=torch.float32):
    taken, grouped = [], mixing._grouped
    monkeypatch.setattr(mixing, "_grouped", lambda *inputs: taken.append(1) or grouped(*inputs))
    one, other = (run(block, way, monkeypatch, dtype) for way in ("loop", "grouped"))
    assert len(taken) == 1
    assert len(one) == len(other) > 2
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1e-3, float(a.abs().max()))


@pytest.mark.parametrize("trained", [True, False])
def test_whole_weights(trained, monkeypatch):
    agree(Block().requires_grad_(trained), monkeypatch, 1e-5)


def test_half_precision(monkeypatch):
    agree(Block().to(torch.bfloat16), monkeypatch, 0.03, torch.bfloat16)


def adapted(block):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(block, LoraConfig(r=8, target_modules=["gate_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_lora_and_lora_switched_off(monkeypatch):
    model = adapted(Block())
    agree(model.base_model.model, monkeypatch, 1e-5)
    with model.disable_adapter():
        off = run_forward(model.base_model.model, "grouped", monkeypatch)
        assert torch.allclose(off, run_forward(Block(), "loop", monkeypatch), atol=1e-6)


def run_forward(block, way, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "grouped_products", lambda h_NK: way == "grouped")
        h_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
        expert_NT = torch.arange(N * T).remainder(E).view(N, T)
        return mix_experts(h_NK, block.experts, expert_NT, torch.ones(N, T)).detach()


def test_nf4_with_lora(monkeypatch):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    block = Block()
    for expert in block.experts:
        for name, linear in list(expert.named_children()):
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
            layer.load_state_dict({"weight": linear.weight.detach()})
            layer.support_avx512bf16_for_cpu = False
            setattr(expert, name, layer.to("cpu"))
    agree(adapted(block).base_model.model, monkeypatch, 1e-5)


def test_dora_takes_the_loop(monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Block(), LoraConfig(r=8, target_modules=["up_proj"], use_dora=True))
    block = model.base_model.model
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "_grouped", None)  # would fail
        run_forward(block, "grouped", monkeypatch)
