"""The sampler's own likelihood: a distribution over all answers, and what one forward at a time gives by hand."""

import itertools

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.models.architecture.dream import DreamConfig, DreamModel
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.sampler_order import sampler_order_scores
from diffdpo.scores.segments import Segments
from tests.support import block_reference
from tests.support.wide import widen

VOCAB, MASK, PROMPT = 6, 5, [3, 1, 2]
IDS = {"mask_token_id": MASK, "eos_token_id": 1}
FULL = ("llada", "dream")


def full_attention(family):
    torch.manual_seed(0)
    if family == "llada":
        shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24, "vocab_size": VOCAB}
        model = LLaDAModelLM(LLaDAConfig.create(**shape, **IDS, pad_token_id=1))
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape |= {
            "intermediate_size": 24,
            "vocab_size": VOCAB,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
        }
        model = DreamModel(DreamConfig(**shape, **IDS))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.6)
    spec = FamilySpec(family, MASK, 1, 1, "Block", "", logit_shift=int(family == "dream"))
    return MaskedLogProbs(model.double().eval(), spec)


def blocks(folder, family, block):
    reference, shift = block_reference.published(folder, family, block)
    loaded = load_model(folder, dtype="float64")
    return MaskedLogProbs(loaded.model, loaded.spec).eval(), widen(reference), shift


def answers_of(ids, prompt=PROMPT):
    return TokenAnswer(np.array([*prompt, *ids], dtype=np.int32), len(prompt))


def scores_of(module, pairs, *, rows=4096, **changes):
    batch = collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    options = {"mask_token_id": module.spec.mask_token_id, "block_size": module.spec.block_size} | changes
    noise = NoiseOptions("sampler_order", 1, 0, **options)
    return sampler_order_scores(module, batch, noise, device=torch.device("cpu"), segments=Segments(rows=rows))


def total_probability(module, words, length, prompt=PROMPT):
    everything = [answers_of(ids, prompt) for ids in itertools.product(range(words), repeat=length)]
    pairs = [TokenPair(str(i), *everything[i : i + 2]) for i in range(0, len(everything), 2)]
    return scores_of(module, pairs).score_B2.exp().sum().item()


@pytest.mark.parametrize("family", FULL)
def test_the_probabilities_of_all_answers_sum_to_one(family):
    assert total_probability(full_attention(family), VOCAB, 3) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("prompt", [[3, 1, 2, 4], [3, 1, 2]], ids=["one block", "two blocks"])
@pytest.mark.parametrize("family", block_reference.FAMILIES)
def test_they_do_under_a_block_causal_model(family, prompt, tmp_path):
    module, _, _ = blocks(tmp_path, family, 4)
    assert total_probability(module, block_reference.WORDS, 2, prompt) == pytest.approx(1, abs=1e-10)


def by_hand(module, prompt, answer):
    """One forward a token with transformers' own interface: all logits, no rows, no segments."""
    shift, masked, total = module.spec.logit_shift, set(range(len(answer))), 0.0
    while masked:
        ids = [*prompt, *(MASK if i in masked else token for i, token in enumerate(answer))]
        logp = module.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        place = max(sorted(masked), key=lambda i: logp[len(prompt) + i - shift].max().item())
        total += logp[len(prompt) + place - shift, answer[place]].item()
        masked.remove(place)
    return total


@pytest.mark.parametrize("rows", [1, 3, 4096])
@pytest.mark.parametrize("family", FULL)
def test_it_is_one_forward_a_token_by_hand(family, rows):
    module = full_attention(family)
    first, second, third = [0, 1, 2, 3, 4, 1], [4, 4], [2, 0, 0, 1]
    pairs = [TokenPair("a", answers_of(first), answers_of(second)), TokenPair("b", answers_of(third, [4]), None)]
    found = scores_of(module, pairs, rows=rows)
    with torch.no_grad():
        expected = [[by_hand(module, PROMPT, each) for each in (first, second)], [by_hand(module, [4], third), 0.0]]
    torch.testing.assert_close(found.score_B2, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.tokens_B2.tolist() == [[6, 2], [4, 0]] and not found.stderr_B2.any()


def block_by_hand(model, ids, prompt, block, shift):
    total = 0.0
    for first in range(prompt // block * block, len(ids), block):
        masked = set(range(max(prompt, first), min(first + block, len(ids))))
        while masked:
            last = min(first + block, len(ids))
            noisy = torch.tensor([block_reference.MASK if i in masked else ids[i] for i in range(last)])
            seen = block_reference.block_causal(last, block, torch.float64)
            logp = model(noisy[None], attention_mask=seen).logits[0].log_softmax(-1)
            place = max(sorted(masked), key=lambda i: logp[i - shift].max().item())
            total += logp[place - shift, ids[place]].item()
            masked.remove(place)
    return total


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("family", block_reference.FAMILIES)
def test_a_block_is_written_before_the_next(family, rows, tmp_path):
    module, model, shift = blocks(tmp_path, family, 4)
    long, short = list(range(4, 15)), [7, 2, 9]
    pairs = [TokenPair("a", answers_of(long), answers_of(short)), TokenPair("b", answers_of(short, [5] * 8), None)]
    found = scores_of(module, pairs, rows=rows).score_B2
    with torch.no_grad():
        expected = [
            [block_by_hand(model, [*PROMPT, *each], len(PROMPT), 4, shift) for each in (long, short)],
            [block_by_hand(model, [*[5] * 8, *short], 8, 4, shift), 0.0],
        ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_filled_blocks_are_scored_with_what_fills_them(tmp_path):
    module, _, _ = blocks(tmp_path, "sdar", 4)
    pairs = [TokenPair("a", answers_of([4, 5, block_reference.EOS]), answers_of([4, 5] + 2 * [block_reference.EOS]))]
    filled = scores_of(module, pairs, fill_with=block_reference.EOS)
    assert filled.tokens_B2[0].tolist() == [5, 5] and filled.score_B2[0, 0] == filled.score_B2[0, 1]
