"""``--activation_offload``: the same gradients to the bit, from inputs that were away meanwhile; and planned."""

import json

import pytest
import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.planner.hardware import GPUS, Host
from diffdpo.planner.memory import DEVICE, HOST
from diffdpo.planner.plan import Machine, make_plan
from diffdpo.planner.sizes import GIB
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import forward_rows
from tests.second_device import AWAY, MEMORY, second_device
from tests.support.shapes import LLADA_8B
from tests.support.steps import WORLD


def gradients(tiny_model, batch, *, device, offload, lora=False):
    torch.manual_seed(0)
    loaded = load_model(str(tiny_model), device=str(device))
    model = add_lora(loaded.model, loaded.spec, r=2) if lora else loaded.model.requires_grad_(True)
    module = MaskedLogProbs(model, loaded.spec, layer_checkpointing=True, offload=offload)
    rows = NoiseOptions("mask_count", 2, 0, loaded.spec.mask_token_id).draw_rows(batch, device)
    before = MEMORY.now
    f_R = forward_rows(module, rows)
    held = MEMORY.now - before
    trained = [p for p in module.parameters() if p.requires_grad]
    return [g.cpu() for g in torch.autograd.grad(f_R.sum(), trained)], held


@pytest.fixture(scope="module")
def batch(tiny_model):
    from diffdpo.doctor.measured import sample_batch

    return sample_batch(load_model(str(tiny_model)))


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_gradients_to_the_bit(tiny_model, batch, lora):
    kept, away = (
        gradients(tiny_model, batch, device=WORLD.device, offload=offload, lora=lora)[0] for offload in (False, True)
    )
    assert all(map(torch.equal, kept, away))


def test_on_a_device_the_inputs_are_gone_meanwhile(tiny_model, batch):
    with second_device():
        (kept, held), (away, left) = (
            gradients(tiny_model, batch, device=AWAY, offload=offload) for offload in (False, True)
        )
    assert all(map(torch.equal, kept, away))
    assert left < held


def test_it_is_planned(tmp_path):
    """What leaves the card is what comes to the host."""
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B | {"n_layers": 12}))
    flags = {"model_name_or_path": str(tmp_path / "config.json"), "ds_config": "4080_qlora", "load_in_4bit": True}
    flags |= {"use_peft": True, "gradient_checkpointing": True, "segment_rows": 4, "num_mc_samples": 8}
    flags |= {"max_length": 1024, "per_device_train_batch_size": 1}
    plans = [
        make_plan(
            make_config(TrainConfig, flags | {"activation_offload": to}),
            Machine(GPUS["RTX 4080"], Host(64 * GIB)),
            timed=False,
        )
        for to in ("none", "cpu")
    ]
    moved = [sum(part.bytes for part in plan.parts if part.place == HOST) for plan in plans]
    inputs = 12 * 4096 * 4 * 1024 * 2
    assert moved[1] - moved[0] == inputs
    card = [sum(part.bytes for part in plan.parts if part.place == DEVICE and not part.assumed) for plan in plans]
    assert 0.8 * inputs < card[0] - card[1] <= inputs


def test_it_needs_layers_that_are_recomputed():
    with pytest.raises(UserError, match="--gradient_checkpointing"):
        make_config(TrainConfig, {"activation_offload": "cpu"})
