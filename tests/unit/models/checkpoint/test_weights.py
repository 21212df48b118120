"""Published directories that contradict themselves: each is an error that names the thing, in full weights and NF4."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitsAndBytesConfig

from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from tests.support.published import LLADA, ROWS, write

INDEX = "model.safetensors.index.json"
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def folder(tmp_path, tokenizer):
    write(tmp_path / "published", LLADA, tokenizer, shards=2)
    return tmp_path / "published"


def shard(folder, number):
    return folder / f"model-{number:05}-of-00002.safetensors"


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_map(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def without_a_tensor(folder):
    change(shard(folder, 2), lambda tensors: tensors.pop(min(tensors)))


def misshapen(folder):
    name = "model.transformer.blocks.1.q_proj.weight"
    path = next(p for p in (shard(folder, 1), shard(folder, 2)) if name in load_file(p))
    change(path, lambda tensors: tensors.update({name: tensors[name][:, :-2].contiguous()}))


def one_too_many(folder):
    change(shard(folder, 1), lambda tensors: tensors.update({"model.transformer.extra.weight": torch.zeros(3)}))


def twice(folder):
    name, value = next(iter(load_file(shard(folder, 2)).items()))
    change(shard(folder, 1), lambda tensors: tensors.update({name: value * 2}))


def as_int8(folder):
    change(shard(folder, 1), lambda tensors: tensors.update({k: v.to(torch.int8) for k, v in tensors.items()}))


def cut(folder):
    shard(folder, 2).write_bytes(shard(folder, 2).read_bytes()[:-100])


def elsewhere(folder):
    edit_map(folder, lambda where: where.update({min(where): "model-00002-of-00002.safetensors"}))


def promised(folder):
    edit_map(folder, lambda where: where.update({"model.other": "model-00001-of-00002.safetensors"}))


def outside(folder):
    edit_map(folder, lambda where: where.update({min(where): "../model.safetensors"}))


def no_name(folder):
    edit_map(folder, lambda where: where.update({min(where): None}))


def both(folder):
    save_file(load_file(shard(folder, 1)), folder / "model.safetensors", {"format": "pt"})


def no_index(folder):
    (folder / INDEX).unlink()


def only_pickles(folder):
    for path in (shard(folder, 1), shard(folder, 2), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


DAMAGE = {
    without_a_tensor: r"1 missing tensors, first model\.transformer",
    misshapen: r"blocks\.1\.q_proj\.weight has shape \(32, 30\), config\.json says \(32, 32\)",
    one_too_many: r"unexpected tensor model\.transformer\.extra",
    twice: "is in model-00001-of-00002.safetensors and in model-00002",
    as_int8: "as I8; supported: F64, F32, BF16, F16",
    cut: r"model-00002-of-00002\.safetensors: ",
    elsewhere: "looks for .* in model-00002-of-00002.safetensors, which does not have it",
    promised: r"looks for model\.other in",
    outside: r"'\.\./model\.safetensors' is no file of this folder",
    no_name: "None is no file of this folder",
    both: "holds both model.safetensors and",
    no_index: r"model-00001-of-00002\.safetensors needs its model\.safetensors\.index\.json",
    only_pickles: r"pytorch_model\.bin must be converted to safetensors",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "load_in_4bit",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_BITSANDBYTES, reason="no bitsandbytes"))],
)
def test_what_is_wrong_is_named(damage, load_in_4bit, folder):
    damage(folder)
    with pytest.raises(UserError, match=DAMAGE[damage]):
        load_model(folder, dtype="bfloat16", load_in_4bit=load_in_4bit)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_tied_and_stored_must_be_the_embedding(equal, tmp_path, tokenizer):
    tensors = write(tmp_path / "tied", LLADA | {"weight_tying": True}, tokenizer, shards=1)
    head = tensors["model.transformer.wte.weight"].clone()
    head[3, 4] += 0 if equal else 1
    file = tmp_path / "tied" / "model-00001-of-00001.safetensors"
    (tmp_path / "tied" / INDEX).unlink()
    save_file(
        {**tensors, "model.transformer.ff_out.weight": head}, file.with_name("model.safetensors"), {"format": "pt"}
    )
    if equal:
        assert load_model(tmp_path / "tied").model.head.weight.shape == (ROWS, 32)
        return
    with pytest.raises(UserError, match=r"ff_out\.weight is tied, but other numbers are stored"):
        load_model(tmp_path / "tied")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", ""])
def test_a_config_that_is_no_object_is_an_error(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="no model config"):
        load_model(folder)


def test_a_tokenizer_config_that_is_no_object_is_an_error(folder):
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="no tokenizer"):
        load_model(folder)


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="no bitsandbytes")
def test_nf4_weights_are_those_that_transformers_makes(folder):
    ours = load_model(folder, dtype="bfloat16", load_in_4bit=True).model
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.transformer.ff_out"],
    )
    theirs = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu")
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert type(parameter) is type(expected[name]), name
        assert torch.equal(parameter, expected[name]), name
    for block, other in zip(ours.blocks, theirs.blocks, strict=True):
        state, their_state = block.q_proj.weight.quant_state, other.q_proj.weight.quant_state
        assert torch.equal(state.absmax, their_state.absmax)
        assert (state.dtype, state.blocksize, state.nested) == (their_state.dtype, their_state.blocksize, True)


def test_the_files_of_its_own_code_come_along(tmp_path, folder, tokenizer):
    """Dream's modeling file imports a third one, which `auto_map` does not name."""
    from transformers.dynamic_module_utils import get_relative_import_files

    (folder / "modeling_llada.py").write_text("from .configuration_llada import A\nfrom .generation_utils import B\n")
    (folder / "configuration_llada.py").write_text("A = 1\n")
    (folder / "generation_utils.py").write_text("B = 2\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.2}')
    loaded = load_model(folder)
    loaded.model.save_pretrained(tmp_path / "back")
    needed = get_relative_import_files(tmp_path / "back" / "modeling_llada.py")
    assert sorted(Path(file).name for file in needed) == ["configuration_llada.py", "generation_utils.py"]
    assert all(Path(file).is_file() for file in needed)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"temperature": 0.2}
