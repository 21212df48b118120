"""iLLaDA against transformers' Llama, which has the same layout, under a 4-D mask that hides nothing."""

import filecmp
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffdpo.models.architecture.illada import ILLaDAForCausalLM
from diffdpo.models.load import load_model, save_model
from diffdpo.models.lora.adapters import add_lora, merge
from diffdpo.sampling.decode import sample
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from tests.support.wide import widen

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "rms_norm_eps": 1e-5,
}
IDS = [7, 14, 15, 9, 5, 6, 5, 35, 5, 9, 8]
SCORED = [(4, 26), (6, 10), (8, 8)]  # (position, target)


def published(folder, *, biased=False, tied=True, words=60):
    """transformers' Llama with random weights, saved as iLLaDA is published; its tokenizer names no mask."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased, **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in fp32
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3) if parameter.dim() > 1 or biased else None
    model.save_pretrained(folder)
    settings = {
        **SHAPE,
        "model_type": "illada",
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": biased,
        "mlp_bias": biased,
        "resid_pdrop": 0.0,
        "layer_norm_eps": None,
        "rope_theta": 5e5,
        "vocab_size": words,
        "hidden_act": "silu",
        "some_future_key": [1, 2],
    } | ({} if tied else {"tie_word_embeddings": False})
    (folder / "config.json").write_text(json.dumps(settings))
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<[CLS]>": 4, "<[MASK]>": 5}
    vocabulary |= {f"w{i}": i for i in range(6, words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return model


def reference_scores(model):
    """log p at the scored positions, from transformers."""
    ids = torch.tensor([IDS])
    logits = model(ids, attention_mask=torch.zeros(1, 1, len(IDS), len(IDS), dtype=model.dtype)).logits
    logp = logits[0].log_softmax(-1)
    return torch.stack([logp[position, target] for position, target in SCORED])


def our_scores(loaded):
    position, target = torch.tensor(SCORED).T
    row_M = torch.zeros_like(position)
    return MaskedLogProbs(loaded.model, loaded.spec)(
        torch.tensor([IDS]), torch.tensor([len(IDS)]), row_M, position, target
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_transformers_llama_without_its_causal_mask(dtype, tolerance, biased, tied, tmp_path):
    model = published(tmp_path, biased=biased, tied=tied)
    loaded = load_model(tmp_path, dtype=dtype)
    assert type(loaded.model) is ILLaDAForCausalLM
    assert (loaded.spec.mask_token_id, loaded.spec.terminator_id, loaded.spec.logit_shift) == (5, 2, 0)
    expected = reference_scores(widen(model if dtype == "float64" else model.float()))
    assert (our_scores(loaded) - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def test_save_and_load_give_identical_bytes_and_scores_and_transformers_reads_them(tmp_path):
    model = published(tmp_path / "published")
    loaded = load_model(tmp_path / "published", dtype="float64")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "back")
    again = load_model(tmp_path / "back", dtype="float64")
    assert torch.equal(our_scores(loaded), our_scores(again))
    assert again.spec == loaded.spec and again.tokenizer.mask_token == "<[MASK]>"
    save_model(again.model, again.tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert filecmp.cmp(tmp_path / "back" / name, tmp_path / "again" / name, shallow=False), name
    theirs = load_file(tmp_path / "published" / "model.safetensors")
    ours = load_file(tmp_path / "back" / "model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "back", config=model.config, dtype=torch.float64)
    # two objects' tensors lie at other addresses, which some processors' products round by
    torch.testing.assert_close(reference_scores(widen(llama)), reference_scores(widen(model)), rtol=1e-12, atol=1e-12)


def test_a_tokenizer_class_that_only_remote_code_has(tmp_path):
    published(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "ILLaDATokenizer"}))
    loaded = load_model(tmp_path)
    assert loaded.tokenizer.encode("w6 w7") == [6, 7] and loaded.spec.mask_token_id == 5


def test_all_of_it_trains_and_an_adapter_is_merged_into_what_is_loaded(tmp_path):
    published(tmp_path / "published")
    loaded = load_model(tmp_path / "published", dtype="float64")
    loaded.model.requires_grad_(True)
    our_scores(loaded).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loaded.model.parameters())
    adapted = add_lora(loaded.model, loaded.spec, r=2)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B of seven projections in two layers
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    with_adapter = our_scores(type(loaded)(adapted, loaded.tokenizer, loaded.spec))
    save_model(merge(adapted), loaded.tokenizer, tmp_path / "merged")
    assert (our_scores(load_model(tmp_path / "merged", dtype="float64")) - with_adapter).abs().max() < 1e-6


def test_nf4_and_sampling(tmp_path):
    pytest.importorskip("bitsandbytes")
    published(tmp_path)
    loaded = load_model(tmp_path, load_in_4bit=True)
    assert our_scores(loaded).isfinite().all()
    (answer,) = sample(loaded.model, loaded.spec, [[7, 8, 9]], gen_length=8, steps=8, block_length=4)
    assert 5 not in answer and len(answer) <= 8


def test_where_id_5_is_ordinary_text_words_stay_whole_and_it_is_told(tmp_path, caplog):
    published(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["vocab"] = {("w" if k == "<[MASK]>" else k): v for k, v in settings["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = load_model(tmp_path)
    assert loaded.spec.mask_token_id == 5 and loaded.tokenizer.encode("w6 w7") == [6, 7]
    assert "5, the published one, is taken, which is 'w' in this tokenizer" in caplog.text
