import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from diffdpo.errors import UserError
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM


def config(**changes):
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40}
    ids = {"mask_token_id": 39, "eos_token_id": 1, "pad_token_id": 1}
    return LLaDAConfig.create(**(shape | ids | changes))


def test_parameter_names_are_the_published_ones():
    names = set(LLaDAModelLM(config(n_layers=1)).state_dict())
    block = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm"]
    expected = {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    assert names == expected | {f"model.transformer.blocks.0.{name}.weight" for name in block}


def test_eight_billion_shape_has_the_published_size():
    with torch.device("meta"):
        model = LLaDAModelLM(
            config(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288, vocab_size=126464)
        )  # fmt: skip
    assert len(model.state_dict()) == 291
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184


def test_random_init_scales_what_writes_to_the_residual_stream():
    torch.manual_seed(0)
    model = LLaDAModelLM(config(d_model=128, n_layers=8))
    block = model.blocks[3]
    assert block.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for linear in (block.attn_out, block.ff_out):
        assert linear.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_tied_head_is_one_tensor():
    model = LLaDAModelLM(config(weight_tying=True))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    "key", ["d_model", "mlp_hidden_size", "rope", "rope_theta", "weight_tying", "mask_token_id", "block_type"]
)
def test_a_missing_key_is_named(key):
    broken = config()
    setattr(broken, key, None)
    with pytest.raises(UserError, match=f"lacks {key}"):
        LLaDAModelLM(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_type": "sequential"}, "block_type='sequential'"),
        ({"alibi": True}, "alibi=True"),
        ({"residual_dropout": 0.1}, "residual_dropout=0.1"),
        ({"n_heads": 5}, "n_heads=5"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"multi_query_attention": True, "n_kv_heads": 4}, "multi_query_attention"),
        ({"embedding_size": 20}, "embedding_size=20"),
        ({"mask_token_id": 40}, "mask_token_id=40"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; expected: float"),
        ({"weight_tying": 1}, "weight_tying=1"),
        ({"n_layers": 0}, "n_layers=0; it must be above 0"),
        ({"mask_token_id": -1}, "mask_token_id=-1, no token"),
        ({"eos_token_id": 40}, "eos_token_id=40, no token"),
        ({"pad_token_id": -1}, "pad_token_id=-1, no token"),
        ({"eos_token_id": "end"}, "eos_token_id='end', no token"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"num_experts": 64}, "num_experts=64; supported: 0"),
        ({"logit_shift": 2}, "logit_shift=2; supported: 0, 1"),
        ({"logit_shift": 1.0}, r"logit_shift=1\.0; supported: 0, 1"),
        ({"logit_shift": True}, "logit_shift=True; supported: 0, 1"),
        ({"attention_dropout": None}, r"attention_dropout=None; supported: 0\.0"),
    ],
)
def test_a_contradiction_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        LLaDAModelLM(config(**changes))


def test_attention_mask_must_be_a_prefix():
    model = LLaDAModelLM(config())
    with pytest.raises(ValueError, match="prefix"):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize(
    "arguments", [{"position_ids": torch.arange(3)[None]}, {"return_dict": False}, {"use_cache": True}]
)
def test_arguments_that_would_be_ignored_are_errors(arguments):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=f"LLaDAModelLM takes no {next(iter(arguments))}"):
        LLaDAModelLM(config())(ids, **arguments)
    nothing = {"position_ids": None, "return_dict": True, "use_cache": False}
    assert LLaDAModelLM(config())(ids, **nothing).logits.shape == (1, 3, 40)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 2), (3,)])
def test_an_attention_mask_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*, input_ids \[1, 3\]; they must be the same"):
        LLaDAModelLM(config())(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(shape))


def test_dropouts_are_written_where_the_checkpoint_has_none(tmp_path):
    """The published code's default for an absent key is 0.1."""
    keys = {"attention_dropout", "residual_dropout", "embedding_dropout"}
    settings = {key: value for key, value in config().to_dict().items() if key not in keys}
    LLaDAModelLM(LLaDAConfig.from_dict(settings)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in keys} == dict.fromkeys(keys, 0.0)


def test_resizing_the_vocabulary_keeps_head_config_and_logits():
    torch.manual_seed(0)
    model = LLaDAModelLM(config())
    ids = torch.arange(10)[None]
    before = model(ids).logits
    model.resize_token_embeddings(48)
    assert (model.config.vocab_size, model.config.embedding_size) == (48, 48)
    assert torch.allclose(model(ids).logits[..., :40], before)
    assert model.head(torch.zeros(2, 32), torch.tensor([1, 2])).shape == (2,)


def test_auto_classes(tmp_path):
    model = LLaDAModelLM(config())
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LLaDAConfig)
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path), LLaDAModelLM)
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):  # it would be scored from left to right
        AutoModelForCausalLM.from_pretrained(tmp_path)
