import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.models.architecture.dream import (
    DreamConfig,
    DreamModel,
    LlamaDiffusionConfig,
    Qwen2DiffusionConfig,
    Qwen3DiffusionConfig,
)
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.scores.masked_log_probs import MaskedLogProbs

MASK, VOCAB = 29, 30
LENGTHS = [7, 12, 12, 1, 9]


DECODERS = {
    "dream": DreamConfig,
    "qwen2": Qwen2DiffusionConfig,
    "qwen3": Qwen3DiffusionConfig,
    "llama": LlamaDiffusionConfig,
}
FAMILIES = ("llada", "llada_mqa_tied", *DECODERS)


def make(family):
    torch.manual_seed(0)
    if family.startswith("llada"):
        kind = {"n_kv_heads": 2} if family == "llada" else {"n_kv_heads": 1, "weight_tying": True}
        config = LLaDAConfig.create(
            d_model=24, n_layers=3, n_heads=4, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=1, pad_token_id=1,
            **kind,
        )  # fmt: skip
        model, shift = LLaDAModelLM(config), 0
    else:
        config = DECODERS[family](
            hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
            vocab_size=VOCAB, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=family == "qwen3",
            mask_token_id=MASK,
        )  # fmt: skip
        model, shift = DreamModel(config), 1
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model, FamilySpec(family, MASK, 1, 1, "Block", LLADA_LORA_TARGETS, logit_shift=shift)


def batch(padding=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, MASK, (len(LENGTHS), max(LENGTHS) + padding), generator=generator)
    row = torch.tensor([0, 0, 1, 1, 1, 2, 4])
    position = torch.tensor([2, 6, 1, 5, 11, 3, 8])
    target = ids[row, position].clone()
    ids[row, position] = MASK
    return ids, torch.tensor(LENGTHS), row, position, target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_waste", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("layer_checkpointing", [False, True])
def test_packed_rows_score_as_each_row_alone(family, max_waste, layer_checkpointing):
    model, spec = make(family)
    scorer = MaskedLogProbs(model, spec, max_waste=max_waste, layer_checkpointing=layer_checkpointing)
    ids, lengths, row, position, target = batch(padding=3)
    together = scorer(ids, lengths, row, position, target)
    gradient = torch.autograd.grad(together.sum(), model.parameters())
    alone = []
    for r, p, t in zip(row.tolist(), position.tolist(), target.tolist(), strict=True):
        logits = model(ids[r : r + 1, : LENGTHS[r]]).logits[0]
        alone.append(logits.log_softmax(-1)[p - spec.logit_shift, t])
    alone = torch.stack(alone)
    assert torch.allclose(together, alone, atol=1e-5)
    for a, b in zip(gradient, torch.autograd.grad(alone.sum(), model.parameters()), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_content_and_other_rows_change_nothing(family):
    model, spec = make(family)
    scorer = MaskedLogProbs(model, spec, max_waste=1.0)
    ids, *rest = batch(padding=2)
    before = scorer(ids, *rest)
    for r, length in enumerate(LENGTHS):
        ids[r, length:] = 5
    ids[3, 0] = 17  # a row nobody scores
    assert torch.equal(before, scorer(ids, *rest))


def test_nothing_to_score_is_still_part_of_the_graph():
    model, spec = make("llada")
    ids, lengths, *_ = batch()
    empty = (torch.zeros(0, dtype=torch.long),) * 3
    out = MaskedLogProbs(model, spec)(ids, lengths, *empty)
    assert out.shape == (0,)
    out.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_first_token_of_a_shifted_model_cannot_be_scored():
    model, spec = make("qwen3")
    ids, lengths, *_ = batch()
    with pytest.raises(ValueError, match="position 0"):
        MaskedLogProbs(model, spec)(ids, lengths, *(torch.zeros(1, dtype=torch.long),) * 3)


def test_liger_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use_liger_kernel needs a GPU"):
        MaskedLogProbs(*make("llada"), use_liger=True)


def test_a_small_logits_budget_changes_nothing():
    model, spec = make("llada")
    arguments = batch()
    plenty, tight = (MaskedLogProbs(model, spec, logits_budget=size)(*arguments) for size in (None, 4 * VOCAB))
    assert torch.allclose(plenty, tight, atol=1e-6)


def test_layer_checkpointing_recomputes_the_blocks():
    model, spec = make("llada")
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    MaskedLogProbs(model, spec, layer_checkpointing=True)(*batch()).sum().backward()
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "qwen3"])
def test_a_block_compiles_in_one_graph_and_gives_the_same(family):
    model, spec = make(family)
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    out = MaskedLogProbs(model, spec, max_waste=1.0)(*batch())
    gradient = torch.autograd.grad(out.sum(), model.parameters())
    plain, _ = make(family)
    expected = MaskedLogProbs(plain, spec, max_waste=1.0)(*batch())
    assert torch.allclose(out, expected, atol=1e-5)
    for a, b in zip(gradient, torch.autograd.grad(expected.sum(), plain.parameters()), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_model_without_graph_and_no_grad():
    model, spec = make("llada")
    model.requires_grad_(False)
    assert not MaskedLogProbs(model, spec, layer_checkpointing=True)(*batch()).requires_grad
