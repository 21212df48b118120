"""A folder that others read: whose class an adapter names, whose eyes the weights are for."""

import json
import subprocess
import sys

import pytest

from diffdpo.models.load import load_model, save_model
from diffdpo.models.lora.adapters import add_lora


@pytest.fixture
def base(tmp_path, model, tokenizer):
    save_model(model.float(), tokenizer, tmp_path / "base")
    return tmp_path / "base"


def test_weights_are_as_readable_as_their_neighbours(base, tmp_path):
    loaded = load_model(base)
    save_model(add_lora(loaded.model, loaded.spec, r=2), loaded.tokenizer, tmp_path / "adapter")
    for folder in (base, tmp_path / "adapter"):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_an_adapter_names_no_class_of_this_package(base, tmp_path):
    from peft import AutoPeftModel

    loaded = load_model(base)
    save_model(add_lora(loaded.model, loaded.spec, r=2), loaded.tokenizer, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert "diffdpo" not in text
    assert json.loads(text)["auto_mapping"] == {"base_model_class": "AutoModel", "parent_library": "transformers"}
    assert AutoPeftModel.from_pretrained(tmp_path / "adapter").peft_config["default"].r == 2


@pytest.mark.parametrize("kernel", ["flash_attention_2", "eager", "no_such_kernel"])
def test_another_program_s_kernel_in_the_config_is_no_trouble(base, kernel):
    settings = json.loads((base / "config.json").read_text())
    settings |= {"attn_implementation": kernel, "_attn_implementation": kernel}
    (base / "config.json").write_text(json.dumps(settings))
    assert load_model(base).model is not None


def test_saving_imports_no_engine(tmp_path):
    """transformers' own save imports DeepSpeed, and MLflow with it, to know what a model may be wrapped in."""
    code = (
        "import sys, diffdpo; from diffdpo.models.checkpoint.model_folder import write_model;"
        "from pathlib import Path; one = diffdpo.load(); write_model(one.model, one.tokenizer, Path(sys.argv[1]));"
        "print([name for name in ('deepspeed', 'mlflow', 'mlflow.entities') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
