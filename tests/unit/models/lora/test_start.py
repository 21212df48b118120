"""An adapter that training goes on with, and the frozen one that it started as, in one model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffdpo.config import ScoreConfig, SftConfig, TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.models.load import load_model, load_with_adapter, save_model
from diffdpo.models.lora.adapters import add_lora, attach_adapter
from diffdpo.models.lora.start import at_start, keep_start
from diffdpo.scores.masked_log_probs import MaskedLogProbs


@pytest.fixture
def base(tmp_path, model, tokenizer):
    save_model(model, tokenizer, tmp_path / "base")
    return str(tmp_path / "base")


def scores(model, spec):
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 0, 1]), torch.tensor([3, 5, 7]), torch.tensor([9, 10, 11])
    return MaskedLogProbs(model, spec)(ids, torch.tensor([9, 8]), *where).detach()


def shake(adapted, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def adapter_of(base, folder, **options):
    loaded = load_model(base)
    adapted = add_lora(loaded.model, loaded.spec, r=2, **options)
    shake(adapted, 1)
    save_model(adapted, loaded.tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": "ln_f"}])
def test_the_start_stays_while_the_adapter_is_trained(base, tmp_path, options):
    folder = adapter_of(base, tmp_path / "first", **options)
    first = load_model(folder)
    expected = scores(first.model, first.spec)
    loaded = load_model(base)
    model = keep_start(attach_adapter(loaded.model, folder, trained=True))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all("default" in name for name in names)
    assert torch.equal(scores(model, loaded.spec), expected)
    with at_start(model):
        assert torch.equal(scores(model, loaded.spec), expected)
    shake(model, 2)
    moved = scores(model, loaded.spec)
    assert not torch.allclose(moved, expected)
    with at_start(model):
        assert torch.equal(scores(model, loaded.spec), expected)
    assert torch.equal(scores(model, loaded.spec), moved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    save_model(model, loaded.tokenizer, tmp_path / "second")
    assert load_file(tmp_path / "second" / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "first" / "adapter_model.safetensors").keys()
    )
    assert not (tmp_path / "second" / "start").exists()
    second = load_model(str(tmp_path / "second"))
    assert torch.allclose(scores(second.model, second.spec), moved, atol=1e-6)


def test_an_adapter_with_dropout_is_trained_without(base, tmp_path):
    folder = adapter_of(base, tmp_path / "first")
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5}))
    model = attach_adapter(load_model(base).model, folder, trained=True)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]


def test_a_base_of_other_weights_is_refused(base, tmp_path):
    from diffdpo.models.checkpoint.adapter_folder import note_base

    folder = adapter_of(base, tmp_path / "first")
    note_base(tmp_path / "first")
    loaded = load_model(base)
    assert torch.equal(
        scores(load_with_adapter(base, folder).model, loaded.spec), scores(load_model(folder).model, loaded.spec)
    )
    next(loaded.model.parameters()).data += 1.0
    save_model(loaded.model, loaded.tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="other weights"):
        load_with_adapter(str(tmp_path / "other"), folder)


@pytest.mark.parametrize("config_class", [TrainConfig, SftConfig, ScoreConfig])
def test_what_is_no_adapter_is_refused(config_class, base):
    with pytest.raises(UserError, match="--adapter_name_or_path"):
        make_config(config_class, {"adapter_name_or_path": base})


def test_an_adapter_has_its_own_rank_and_its_base(base, tmp_path):
    folder = adapter_of(base, tmp_path / "first")
    config = make_config(TrainConfig, {"adapter_name_or_path": folder})
    assert config.adapts and config.policy == base
    with pytest.raises(UserError, match="lora_r"):
        make_config(TrainConfig, {"adapter_name_or_path": folder, "use_peft": True, "lora_r": 4})
    with pytest.raises(UserError, match="adapter_start"):
        make_config(TrainConfig, {"reference": "adapter_start", "use_peft": True})
