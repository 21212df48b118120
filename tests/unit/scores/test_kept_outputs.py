"""``--checkpoint_keeps``: the same gradients to the bit, fewer products in the backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffdpo.cli import plan
from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.scores.masked_log_probs import MaskedLogProbs


def gradients_and_work(folder, keeps, *, lora=False):
    torch.manual_seed(0)
    loaded = load_model(str(folder))
    model = loaded.model.requires_grad_(True) if not lora else add_lora(loaded.model, loaded.spec, r=2, alpha=4)
    module = MaskedLogProbs(model, loaded.spec, layer_checkpointing=keeps is not None, keeps=keeps or "nothing")
    ids = torch.arange(24).reshape(2, 12) + 5
    row, position = torch.tensor([0, 0, 1]), torch.tensor([3, 7, 11])
    with FlopCounterMode(display=False) as counted:
        module(ids, torch.tensor([12, 12]), row, position, position + 20).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counted.get_total_flops()


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_and_products_are_not_run_again(tiny_model, lora):
    whole, least = gradients_and_work(tiny_model, None, lora=lora)
    work = {}
    for keeps in ("nothing", "attention", "products"):
        found, work[keeps] = gradients_and_work(tiny_model, keeps, lora=lora)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True)) and len(found) == len(whole)
    assert work["nothing"] > work["products"] == least


@pytest.mark.parametrize(
    "words", [["--checkpoint_keeps", "attention", "--gradient_checkpointing"], ["--sequence_parallel_size", "2"]]
)
def test_what_is_not_planned_is_one_line(words):
    with pytest.raises(UserError, match=f"{words[0]} is not planned"):
        plan.main(words)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"checkpoint_keeps": "attention"}, "add --gradient_checkpointing"),
        ({"checkpoint_keeps": "products", "gradient_checkpointing": True, "torch_compile": True}, "--torch_compile"),
        (
            {"checkpoint_keeps": "products", "gradient_checkpointing": True, "activation_offload": "cpu"},
            "--activation_offload",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, told):
    with pytest.raises(UserError, match=told):
        make_config(TrainConfig, flags)
