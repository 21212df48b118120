import json
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdpo.cli import export
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.adapter_folder import note_base
from diffdpo.models.load import load_model, save_model
from diffdpo.models.lora.adapters import add_lora


@pytest.fixture
def base(tmp_path, model, tokenizer):
    save_model(model.bfloat16(), tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    loaded = load_model(base)
    adapted = add_lora(loaded.model, loaded.spec, r=4, use_rslora=True)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(folder):
    return load_model(folder).model(torch.arange(5, 20)[None]).logits


def test_a_merged_adapter_gives_the_adapter_s_logits(adapter, base, tmp_path, capsys):
    export.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    assert "M parameters in float32" in capsys.readouterr().err
    assert torch.allclose(logits(tmp_path / "merged"), logits(adapter), atol=1e-5)
    assert not torch.allclose(logits(base), logits(adapter), atol=1e-2)
    names = [set(load_file(folder / "model.safetensors")) for folder in (base, tmp_path / "merged")]
    assert names[0] == names[1]  # the published names, nothing of peft
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_export_makes_its_parent_folder_and_has_a_card(adapter, base, tmp_path):
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    output = tmp_path / "not" / "there" / "merged"
    export.main(["--adapter", str(adapter), "--output", str(output)])
    card = (output / "README.md").read_text()
    assert "base_model: base\n" in card and "license: mit\n" in card and "library_name: transformers\n" in card
    assert str(tmp_path) not in card


def test_auto_keeps_the_dtype_of_the_base_and_a_moved_base_can_be_named(adapter, base, tmp_path):
    moved = base.rename(tmp_path / "moved")
    export.main(["--adapter", str(adapter), "--model_name_or_path", str(moved), "--output", str(tmp_path / "out")])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_base_of_equal_shape_is_refused(adapter, base, tmp_path, capsys):
    note_base(adapter)
    tensors = load_file(base / "model.safetensors")
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(base, folder)
    name = max(tensors, key=lambda each: tensors[each].numel())
    save_file(tensors | {name: tensors[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    for folder, fits in ((copy, True), (other, False)):
        flags = [
            "--adapter",
            str(adapter),
            "--model_name_or_path",
            str(folder),
            "--output",
            str(tmp_path / f"of {folder.name}"),
        ]
        if fits:
            export.main(flags)
        else:
            with pytest.raises(UserError, match=r"has other weights than .*base, which the adapter"):
                export.main(flags)
    assert "nothing tells" not in capsys.readouterr().err and not (tmp_path / "of other").exists()
    (adapter / "base.json").unlink()  # somebody else's adapter
    export.main(["--adapter", str(adapter), "--model_name_or_path", str(other), "--output", str(tmp_path / "unknown")])
    assert "nothing tells whether" in capsys.readouterr().err


def test_converting_the_dtype_and_the_shards_of_a_model(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    flags = ["--dtype", "float32", "--max_shard_size", "20KB"]
    export.main(["--model_name_or_path", str(base), "--output", str(out), *flags])
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(logits(out), logits(base))
    assert out.stat().st_mode & stat.S_IXGRP == base.stat().st_mode & stat.S_IXGRP


def test_a_failure_leaves_nothing_behind(base, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("diffdpo.models.architecture.backbone.MaskedLM.save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main(["--model_name_or_path", str(base), "--output", str(tmp_path / "out")])
    assert sorted(tmp_path.iterdir()) == before


def test_user_errors(base, adapter, tmp_path):
    out = ["--output", str(tmp_path / "out")]
    for arguments, words in (
        (out, "nothing to export"),
        (["--adapter", str(base), *out], "has no adapter_config.json; full weights go to --model_name_or_path"),
        (["--model_name_or_path", str(adapter), *out], "give it as --adapter"),
        (["--model_name_or_path", str(base), "--output", str(base)], "exists; name a new folder"),
        (["--model_name_or_path", str(base), "--output", str(base / "config.json" / "b")], "a part of it is a file"),
        (["--model_name_or_path", str(base), "--max_shard_size", "big", *out], "max_shard_size big"),
        (["--model_name_or_path", str(tmp_path / "gone"), *out], "cannot load|no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            export.main(arguments)
    assert not (tmp_path / "out").exists()
