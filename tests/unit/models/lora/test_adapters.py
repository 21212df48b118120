import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter
from diffdpo.models.load import load_adapter, load_model, save_model
from diffdpo.models.lora.adapters import add_lora, merge, reference
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.setup.preflight import check_named as check_names


@pytest.fixture
def base(tmp_path, model, tokenizer):
    save_model(model, tokenizer, tmp_path / "base")
    return str(tmp_path / "base")


def scores(model, spec):
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 0, 1]), torch.tensor([3, 5, 7]), torch.tensor([9, 10, 11])
    return MaskedLogProbs(model, spec)(ids, torch.tensor([9, 8]), *where)


def alike(found, expected, *, atol=1e-5):
    """The same but for rounding: a forward with a graph may take other kernels than one without."""
    return torch.allclose(found, expected, rtol=0, atol=atol)


def randomise(adapted):
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)


def test_default_targets_are_every_linear_of_a_block_and_never_the_head(base):
    loaded = load_model(base)
    adapted = add_lora(loaded.model, loaded.spec, r=2)
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(names) == 2 * 7
    assert sum(name.endswith("ff_out") for name in names) == 2
    assert all(".blocks." in name for name in names)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": r".*q_proj"}])
def test_reference_is_the_base_and_merging_keeps_the_scores(base, options):
    loaded = load_model(base, dtype="float64")
    before = scores(loaded.model, loaded.spec)
    adapted = add_lora(loaded.model, loaded.spec, r=4, **options)
    assert torch.allclose(scores(adapted, loaded.spec), before, atol=1e-12)  # lora_B starts at zero
    randomise(adapted)
    moved = scores(adapted, loaded.spec)
    assert not torch.allclose(moved, before, atol=1e-4)
    with reference(adapted):
        assert alike(scores(adapted, loaded.spec), before, atol=1e-12)
    assert torch.allclose(scores(merge(adapted), loaded.spec), moved, atol=1e-6)


def test_saved_adapter_loads_with_plain_peft_and_through_load_model(base, tmp_path):
    loaded = load_model(base)
    adapted = add_lora(loaded.model, loaded.spec, r=4)
    randomise(adapted)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    expected = scores(adapted, loaded.spec)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.transformer.blocks.0.ff_out.lora_A.weight" in keys
    plain = PeftModel.from_pretrained(load_model(base).model, tmp_path / "adapter")
    assert alike(scores(plain, loaded.spec), expected)
    again = load_model(str(tmp_path / "adapter"))
    assert alike(scores(again.model, again.spec), expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "adapter_config.json cannot be read"),
        ("{}", "names no base_model_name_or_path"),
        ('{"base_model_name_or_path": null}', "names no base_model_name_or_path"),
        ('{"base_model_name_or_path": "x", "peft_type": "IA3"}', "peft_type 'IA3'; supported: 'LORA'"),
    ],
)
def test_an_adapter_config_that_says_too_little_is_an_error(tmp_path, text, words):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


@pytest.fixture
def adapter(base, tmp_path):
    loaded = load_model(base)
    save_model(add_lora(loaded.model, loaded.spec, r=2), loaded.tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def point_at(adapter, base):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))


def test_an_adapter_on_the_wrong_base_is_an_error(adapter, tokenizer, tmp_path):
    save_model(new_model(tokenizer, width=64, layers=2, heads=4, seed=0), tokenizer, tmp_path / "wide")
    save_model(new_model(tokenizer, width=32, layers=3, heads=4, seed=0), tokenizer, tmp_path / "deep")
    for base, words in (
        (tmp_path / "wide", "does not fit .*wide'.*size mismatch"),
        (tmp_path / "deep", "lacks 14 tensors, first base_model"),
        (tmp_path / "gone", "no such folder"),
        (adapter, "an adapter itself: merge it first"),
    ):
        point_at(adapter, base)
        with pytest.raises(UserError, match=words):
            load_model(adapter)


def test_damaged_adapter_weights_are_an_error(adapter):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "base_model.model.other.lora_A.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(UserError, match="has no place for 1 tensors"):
        load_model(adapter)
    weights.write_bytes(b"junk")
    with pytest.raises(UserError, match="does not fit"):
        load_model(adapter)
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors"):
        load_model(adapter)


def test_a_moved_base_can_be_named(adapter, base):
    expected = scores(load_model(adapter).model, load_model(adapter).spec)
    point_at(adapter, "/gone")
    loaded = load_adapter(adapter, base=base)
    assert torch.equal(scores(loaded.model, loaded.spec), expected)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 1}}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["transformer.ff_out"]}, False),
        ({"target_modules": r".*transformer\.ff_out"}, True),
    ],
)
def test_adapters_made_by_plain_peft(options, refused, base, tmp_path):
    loaded = load_model(base)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, **options)).eval()
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    if refused:
        with pytest.raises(UserError, match="changes the LM head; supported: the blocks"):
            load_model(tmp_path / "adapter")
        return
    again = load_model(tmp_path / "adapter")
    assert alike(scores(again.model, again.spec), scores(adapted, loaded.spec))
    with reference(again.model):
        assert alike(scores(again.model, again.spec), scores(load_model(base).model, loaded.spec))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["wte", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["wte"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["transformer.ff_out"]},
    ],
)
def test_what_changes_one_side_of_a_tied_matrix_is_not_merged(options, base, tmp_path):
    adapted = get_peft_model(load_model(base).model, LoraConfig(r=2, **options)).eval()
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="where they are one matrix: adapt blocks"):
        merge(load_model(tmp_path / "adapter").model)


def test_an_adapter_on_an_adapter_is_refused(adapter):
    loaded = load_model(adapter)
    with pytest.raises(UserError, match="has an adapter already"):
        add_lora(loaded.model, loaded.spec)


@pytest.mark.parametrize(
    ("options", "words"), [({"r": 0}, "lora_r is 0"), ({"r": -1}, "lora_r is -1"), ({"alpha": 0}, "lora_alpha is 0")]
)
def test_ranks_and_scales_that_cannot_be_meant_are_errors(base, options, words):
    loaded = load_model(base)
    with pytest.raises(UserError, match=words):
        add_lora(loaded.model, loaded.spec, **options)


@pytest.mark.parametrize(
    ("targets", "per_block"),
    [(None, 7), ("all-linear", 7), ("ff_out", 1), ("q_proj, v_proj,ff_out", 3), (r".*blocks\.0\.(q|k)_proj", 1)],
)
def test_targets_by_name_or_expression(base, targets, per_block):
    loaded = load_model(base)
    adapted = add_lora(loaded.model, loaded.spec, target_modules=targets)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == 2 * per_block
    assert all(".blocks." in name for name in names)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("o_proj", "'o_proj' is no linear module of a block; llada has attn_out, ff_out, ff_proj, k_proj"),
        ("q_proj,down_proj", "'down_proj' is no linear"),
        (r".*o_proj", "matches no linear"),
        ("(", "no regular expression"),
        (r".*ff_out", "matches the LM head"),
        (r".*\.(wte|q_proj)", r"matches model\.transformer\.wte \(Embedding\); only linear modules can be adapted"),
        (r".*\.(q_proj|attn_norm)", r"blocks\.0\.attn_norm \(RMSNorm\); only linear"),
        (r".*\.blocks\.0\..*", r"blocks\.0\.attn_norm \(RMSNorm\); only linear"),
        (".*", r"the model \(LLaDAModelLM\); only linear"),
    ],
)
def test_targets_that_cannot_be_meant_are_errors(base, pattern, words):
    loaded = load_model(base)
    with pytest.raises(UserError, match=words):
        add_lora(loaded.model, loaded.spec, target_modules=pattern)


def test_a_wrong_target_is_met_before_the_weights(base):
    Path(base, "model.safetensors").unlink()
    values = {"model_name_or_path": base, "use_peft": True, "lora_target_modules": r".*\.attn_norm"}
    with pytest.raises(UserError, match="matches no linear module"):
        check_names(make_config(TrainConfig, values))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_quantises_blocks_only_and_trains_adapters(base, tmp_path):
    full = load_model(base, dtype="bfloat16")
    loaded = load_model(base, dtype="bfloat16", load_in_4bit=True)
    kinds = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    linear = {name: kind for name, kind in kinds.items() if name.rsplit(".", 1)[-1] in ("q_proj", "ff_out")}
    assert linear.pop("model.transformer.ff_out") == "VocabularyHead"
    assert set(linear.values()) == {"Linear4bit"}
    assert native(loaded.model).head.weight.dtype == torch.bfloat16
    assert (scores(loaded.model, loaded.spec) - scores(full.model, full.spec)).abs().max() < 0.1
    with pytest.raises(UserError, match="4-bit weights are not written"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "full")
    adapted = add_lora(loaded.model, loaded.spec, r=2)
    with torch.no_grad(), reference(adapted):
        frozen = scores(adapted, loaded.spec)
    policy = scores(adapted, loaded.spec)
    assert alike(policy, frozen, atol=0.05)  # the first step's loss is ln 2, as far as bf16 can tell
    policy.sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)
    with pytest.raises(UserError, match="4-bit"):
        merge(adapted)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")  # and it stands on the original weights
    assert hasattr(load_adapter(tmp_path / "adapter", base=base, dtype="bfloat16").model, "peft_config")


def test_hidden_layers_are_linear_after_merging(base):
    loaded = load_model(base)
    merged = merge(add_lora(loaded.model, loaded.spec, r=2))
    assert type(merged.blocks[0].ff_out) is nn.Linear


def test_plain_peft_puts_an_adapter_on_the_published_module(tmp_path, tokenizer):
    """Qwen2 is published in transformers itself: the adapter trained on our module gives the same logits on theirs."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), intermediate_size=48, eos_token_id=1, pad_token_id=1, **shape)
    config._attn_implementation = "eager"
    published = Qwen2ForCausalLM(config).eval()
    save_model(published, tokenizer, tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    adapted = add_lora(loaded.model, loaded.spec, r=4)
    randomise(adapted)
    save_model(adapted, tokenizer, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(published, str(tmp_path / "adapter")).eval()
    ids, everything_visible = torch.arange(5, 17)[None], torch.zeros(1, 1, 12, 12)
    expected = adapted(ids).logits
    assert torch.allclose(theirs(ids, attention_mask=everything_visible).logits, expected, atol=2e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(ids).logits, expected, atol=1e-2)


def test_added_tokens_survive_saving_and_loading(base, tmp_path):
    loaded = load_model(base)
    loaded.tokenizer.add_tokens(["<step>", "<answer>"])
    loaded.model.resize_token_embeddings(len(loaded.tokenizer))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "grown")
    again = load_model(tmp_path / "grown")
    assert again.tokenizer("<step>").input_ids == [len(loaded.tokenizer) - 2]
    ids = torch.arange(5, 17)[None]
    assert alike(again.model(ids).logits, loaded.model(ids).logits)
    assert again.model(ids).logits.shape[-1] == len(loaded.tokenizer)


@pytest.fixture
def untied(tokenizer, tmp_path):
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": len(tokenizer), "max_sequence_length": 64}
    torch.manual_seed(0)
    save_model(LLaDAModelLM(LLaDAConfig.create(**shape, **ids, weight_tying=False)), tokenizer, tmp_path / "untied")
    return str(tmp_path / "untied")


@pytest.mark.parametrize("names", ["ff_out", "wte,ln_f", "model.transformer.ff_out"])
def test_modules_trained_whole_are_not_the_reference_s_and_are_saved_and_merged(untied, tmp_path, names):
    loaded = load_model(untied)
    before = scores(loaded.model, loaded.spec)
    adapted = add_lora(loaded.model, loaded.spec, r=2, modules_to_save=names)
    whole = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(whole) == len(names.split(",")) and not any(".blocks." in name for name in whole)
    randomise(adapted)
    moved = scores(adapted, loaded.spec)
    assert not torch.allclose(moved, before, atol=1e-4)
    with reference(adapted):
        assert torch.equal(scores(adapted, loaded.spec), before)
    save_model(adapted, loaded.tokenizer, tmp_path / "adapter")
    for again in (load_model(str(tmp_path / "adapter")).model, _with_plain_peft(untied, tmp_path / "adapter")):
        assert torch.equal(scores(again, loaded.spec), moved)
    assert torch.allclose(scores(merge(adapted), loaded.spec), moved, atol=1e-6)


def test_one_side_of_a_tied_matrix_is_not_trained_whole(base):
    loaded = load_model(base)
    with pytest.raises(UserError, match="embedding is its head as well"):
        add_lora(loaded.model, loaded.spec, r=2, modules_to_save="ff_out")


def _with_plain_peft(base, folder):
    return PeftModel.from_pretrained(load_model(base).model, folder)


@pytest.mark.parametrize("names", ["q_proj", "lm_head", "blocks", "wte,nothing"])
def test_modules_that_cannot_be_trained_whole_are_named(base, names):
    loaded = load_model(base)
    with pytest.raises(
        UserError, match=f"'{names.split(',')[-1]}' is no module that can be trained whole; there is .*ff_out"
    ):
        add_lora(loaded.model, loaded.spec, r=2, modules_to_save=names)


def test_a_revision_of_the_base_is_kept_with_the_adapter(base, tmp_path):
    loaded = load_model(base)
    save_model(add_lora(loaded.model, loaded.spec, r=2, revision="v1"), loaded.tokenizer, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (base, "v1")
    assert base_of_adapter(tmp_path / "adapter") == f"{base}@v1"
