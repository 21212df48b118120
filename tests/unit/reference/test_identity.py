"""What a reference score depends on: each ingredient alone gives another fingerprint."""

import json
import shutil

import pytest

from data_pipeline.encode import Encoder
from diffdpo.models.load import load_tokenizer_and_spec
from diffdpo.noise.options import NoiseOptions
from diffdpo.reference.identity import fingerprint, identity_of, weights_digest


@pytest.fixture(scope="module")
def make(tiny_model):
    """``make(ingredient=value)`` → the fingerprint with that ingredient changed."""

    def identity(**changed) -> str:
        tokenizer, spec = load_tokenizer_and_spec(str(tiny_model))
        if changed.pop("token", None):
            tokenizer.add_tokens(["~new~"])
        if template := changed.pop("chat_template", None):
            tokenizer.chat_template = template
        lengths = {name: changed.pop(name, value) for name, value in {"max_length": 64, "truncation": "drop"}.items()}
        noise = {"estimator": "balanced", "num_samples": 4, "seed": 0, "num_diffusion_steps": None}
        noise |= {name: changed.pop(name) for name in tuple(changed) if name in noise}
        return fingerprint(
            identity_of(
                weights=changed.pop("weights", "w"),
                dtype=changed.pop("dtype", "float32"),
                encoder=Encoder(tokenizer, **lengths),
                spec=spec,
                noise=NoiseOptions(mask_token_id=spec.mask_token_id, **noise),
                data_fingerprint=changed.pop("data", "d"),
            )
        )

    return identity


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


CHANGES = [
    *(
        {"weights": "v"},
        {"dtype": "bfloat16"},
        {"data": "e"},
        {"token": True},
        {"chat_template": TEMPLATE},
    ),
    *({"max_length": 65}, {"truncation": "keep_end"}, {"estimator": "mask_count"}, {"num_samples": 8}, {"seed": 1}),
    {"estimator": "trajectory", "num_diffusion_steps": 16},
]


@pytest.mark.parametrize("change", CHANGES, ids=[next(iter(c)) for c in CHANGES])
def test_every_ingredient_counts(make, change):
    assert make(**change) != make()


def test_the_same_settings_give_the_same_fingerprint(make):
    assert make() == make() and make(estimator="trajectory") != make(estimator="trajectory", num_diffusion_steps=16)


def test_weights_are_known_by_content(tiny_model, tmp_path):
    copied = tmp_path / "renamed"
    shutil.copytree(tiny_model, copied)
    assert weights_digest(str(copied)) == weights_digest(str(tiny_model))
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    assert weights_digest(str(copied)) != weights_digest(str(tiny_model))


def test_an_adapter_counts_with_its_base(tiny_model, tmp_path):
    def adapter(base) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"adapter")
        return weights_digest(str(tmp_path))

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert adapter(other) != adapter(tiny_model)
