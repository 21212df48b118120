"""Every family against a plain implementation of its layout, and against recorded numbers of a fixed small model.

Weights come from a formula of the tensor's name, so the recorded values hold on any machine and torch version.
Tolerances: fp64 1e-10; fp32 2e-5; bf16 0.3 nats on log-probabilities of about -5 with weights ten times the usual size.
"""

import hashlib

import numpy as np
import pytest
import torch

from diffdpo.models.architecture.dream import (
    DreamConfig,
    DreamModel,
    LlamaDiffusionConfig,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
)
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from tests.support import plain_models

VOCAB, LENGTH, MASK = 50, 11, 49
IDS = [3, 14, 15, 9, MASK, 6, MASK, 35, MASK, 9, 7]
SCORED = [(4, 26), (6, 5), (8, 8)]  # (position, target)


def llada_config(**changes):
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "vocab_size": VOCAB}
    ids = {"mask_token_id": MASK, "eos_token_id": 1, "pad_token_id": 1}
    return LLaDAConfig.create(**(shape | ids | changes))


DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (model, shift, sum of the three log-probabilities, recorded from the plain implementation)
FAMILIES = {
    "llada": (lambda: LLaDAModelLM(llada_config()), 0, -16.015123673870768),
    "llada_gqa_tied": (lambda: LLaDAModelLM(llada_config(n_kv_heads=2, weight_tying=True)), 0, -15.10407976206711),
    "llada_padded_scaled": (
        lambda: LLaDAModelLM(llada_config(embedding_size=64, scale_logits=True)),
        0,
        -12.736786789776179,
    ),
    "llada_biased_mqa": (
        lambda: LLaDAModelLM(llada_config(n_kv_heads=1, include_qkv_bias=True)),
        0,
        -19.664987613556146,
    ),
    "dream": (lambda: DreamModel(DreamConfig(**DECODER)), 1, -11.003689004406272),
    "qwen2_tied": (
        lambda: DreamModel(Qwen2DiffusionConfig(**DECODER | {"tie_word_embeddings": True})),
        1,
        -13.788435535313871,
    ),
    "qwen3": (lambda: DreamModel(Qwen3DiffusionConfig(**DECODER | {"head_dim": 12})), 1, -15.145726830628227),
    "llama3": (
        lambda: DreamModel(LlamaDiffusionConfig(**DECODER | {"rope_theta": 1e4, "rope_scaling": LLAMA3})),
        1,
        -12.478253637570889,
    ),
}


def set_weights(model):
    """Normal(0.25) from a seed that is the tensor's name; norms about 1; wide enough that every part matters."""
    for name, tensor in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        values = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).standard_normal(tuple(tensor.shape)))
        with torch.no_grad():
            tensor.copy_(values * 0.25 + ("norm" in name or "ln_f" in name))
    return model


def plain_logits(model, ids):
    config = model.config.to_dict()
    weights = model.state_dict(keep_vars=True)  # the parameters themselves: gradients reach them
    if isinstance(model, LLaDAModelLM):
        return plain_models.llada_logits(weights, config, ids)
    size = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    frequencies = plain_models.default_frequencies(size, config["rope_theta"])
    if config["rope_scaling"]:
        numbers = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 64}
        frequencies = plain_models.llama3_frequencies(size, config["rope_theta"], **numbers)
    return plain_models.decoder_logits(weights, config, ids, frequencies)


def plain_scores(model, shift):
    logp = plain_logits(model, torch.tensor(IDS)).log_softmax(-1)
    return torch.stack([logp[position - shift, target] for position, target in SCORED])


def our_scores(model, shift, *, rows=1):
    spec = FamilySpec("x", MASK, 1, 1, "Block", "", logit_shift=shift)
    ids = torch.tensor([IDS] * rows)
    position, target = torch.tensor(SCORED).T
    return MaskedLogProbs(model, spec)(ids, torch.tensor([LENGTH] * rows), torch.zeros_like(position), position, target)


@pytest.mark.parametrize("name", FAMILIES)
def test_fp64_agrees_with_the_plain_implementation(name):
    build, shift, _ = FAMILIES[name]
    model = set_weights(build().double())
    ids = torch.tensor(IDS)
    assert torch.allclose(model(ids[None]).logits[0], plain_logits(model, ids), rtol=0, atol=1e-10)
    assert torch.allclose(our_scores(model, shift), plain_scores(model, shift), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_values(name):
    build, shift, recorded = FAMILIES[name]
    assert our_scores(set_weights(build().double()), shift).sum().item() == pytest.approx(recorded, abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.3)])
def test_lower_precision_stays_close(name, dtype, tolerance):
    build, shift, _ = FAMILIES[name]
    exact = plain_scores(set_weights(build().double()), shift)
    low = our_scores(set_weights(build().double()).to(dtype), shift)
    assert low.dtype == torch.float32
    assert (low - exact).abs().max() < tolerance


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_scores_agree_with_autograd_through_the_plain_logits(name):
    build, shift, _ = FAMILIES[name]
    model = set_weights(build().double())
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(our_scores(model, shift).sum(), parameters)
    full = torch.autograd.grad(plain_scores(model, shift).sum(), parameters)
    for parameter, a, b in zip(names, ours, full, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9), parameter
