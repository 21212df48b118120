"""Parameters counted from a config.json are those of the real module."""

import pytest

from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.lora.adapters import add_lora
from diffdpo.planner.shapes import count, read_shape, skeleton, weight_elements
from tests.support.paths import ROOT
from tests.support.shapes import QWEN


def numbers(path: str, *, bf16: bool = True, cast: bool = True, **settings):
    family, shape = read_shape(path)
    return count(skeleton(family, shape, TrainConfig(**settings), bf16=bf16, cast=cast))


def test_llada_8b(llada_8b):
    full = numbers(llada_8b)
    assert full.total == full.trained == 8_015_581_184
    assert full.trained_bytes == 16_031_162_368 and full.layers == 32 and full.vocabulary == 126_464


def test_lora_and_nf4_of_llada_8b(llada_8b):
    lora = numbers(llada_8b, use_peft=True, lora_r=16, load_in_4bit=True)
    assert lora.adapter == lora.trained == 41_943_040 and lora.total == 8_015_581_184 + 41_943_040
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
    nf4 = blocks // 2 + blocks // 64 + 4 * blocks // (64 * 256)
    rest = 2 * (2 * 126_464 * 4096 + 65 * 4096)
    assert lora.frozen_bytes == nf4 + rest


@pytest.mark.parametrize("lora", [False, True])
def test_as_many_as_the_real_module_has(write_config, lora):
    path = write_config(QWEN)
    family, shape = read_shape(path)
    model = family.model_class(shape)
    if lora:
        spec = FamilySpec("qwen2", 499, 498, 498, "", family.lora_targets)
        model = add_lora(model, spec, r=16)
    found = numbers(path, bf16=False, cast=False, use_peft=lora)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained_bytes + found.frozen_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_what_cannot_be_read_is_named(tmp_path, write_config):
    with pytest.raises(UserError, match=r"has no config.json"):
        read_shape(str(tmp_path))
    with pytest.raises(UserError, match=r"no such file"):
        read_shape(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"model_type 'gpt2'"):
        read_shape(write_config({"model_type": "gpt2"}))


@pytest.mark.parametrize(("name", "parameters"), [("sdar8b", 8_190_735_360), ("llada2mini", 16_255_643_392)])
def test_published_shapes_have_the_published_size(name, parameters):
    assert weight_elements(*read_shape(f"{ROOT}/docs/shapes/{name}.json")) == parameters
