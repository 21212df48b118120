"""Block-causal families against transformers' own models, block by block under an explicit mask, by enumeration."""

import itertools

import numpy as np
import pytest
import torch

from diffdpo.models.load import load_model
from diffdpo.noise.estimators import ESTIMATORS
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold, row_scores
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.shared_clean import clean_inputs
from tests.support.block_reference import BATCH, FAMILIES, MASK, block_causal, exact_score, published, token_log_probs
from tests.support.wide import widen


def options(spec, estimator="exact", n=4):
    return NoiseOptions(estimator, n, 0, spec.mask_token_id, None, spec.block_size)


def log_probs(module, rows):
    inputs = (rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)
    return module(*inputs, *clean_inputs(rows))


def load(folder, dtype):
    loaded = load_model(folder, dtype=dtype)
    return MaskedLogProbs(loaded.model, loaded.spec), loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [2, 4, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_exact_scores_equal_the_enumeration_of_every_block(family, block, dtype, tolerance, tmp_path):
    model, shift = published(tmp_path, family, block)
    model = widen(model)
    module, loaded = load(tmp_path, dtype)
    assert (loaded.spec.block_size, loaded.spec.logit_shift, loaded.spec.mask_token_id) == (block, shift, MASK)
    rows = options(loaded.spec).draw_rows(BATCH, torch.device("cpu"))
    with torch.no_grad():
        logp = log_probs(module, rows)
        weight_M = rows.scale_M * rows.weight_R[rows.row_M]
        ours = torch.zeros(6, dtype=torch.float64).index_add(0, rows.answer_R[rows.row_M], logp.double() * weight_M)
        folded = fold(row_scores(logp, rows), rows).score_B2
        assert folded.dtype == getattr(torch, dtype)
        assert torch.allclose(folded.flatten().double(), ours, rtol=1e-12 if dtype == "float64" else 1e-6)
        for answer in range(6):
            length, prompt = int(BATCH.lengths_B2.flatten()[answer]), int(BATCH.prompt_lengths_B2.flatten()[answer])
            ids = BATCH.input_ids_B2T.flatten(0, 1)[answer, :length].tolist()
            expected = exact_score(model, ids, prompt, block, shift)
            assert abs(ours[answer] - expected) <= tolerance * abs(expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_every_token_of_every_row_equals_its_block_by_itself(family, dtype, tolerance, tmp_path):
    """Log-probabilities themselves, without weights: a row has masks in all blocks, the reference in one at a time."""
    block = 4
    model, shift = published(tmp_path, family, block)
    model = widen(model)
    module, loaded = load(tmp_path, dtype)
    rows = options(loaded.spec, "mask_count", n=3).draw_rows(BATCH, torch.device("cpu"))
    with torch.no_grad():
        logp_M = log_probs(module, rows)
        for row in range(len(rows)):
            answer = int(rows.answer_R[row])
            ids = BATCH.input_ids_B2T.flatten(0, 1)[answer, : int(BATCH.lengths_B2.flatten()[answer])].tolist()
            place_M = (rows.row_M == row).nonzero()[:, 0].tolist()
            position = {int(rows.clean.start_A[answer] + rows.position_M[m]): m for m in place_M}
            for _, masked in itertools.groupby(sorted(position), key=lambda i: i // block):
                for i, expected in token_log_probs(model, ids, list(masked), block, shift).items():
                    assert abs(logp_M[position[i]] - expected) <= tolerance * max(1, abs(expected))


def test_the_full_forward_is_block_causal_and_transformers_reads_what_is_saved(tmp_path):
    from diffdpo.models.load import save_model

    model, _ = published(tmp_path / "published", "sdar", 4)
    loaded = load_model(tmp_path / "published", dtype="float64")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "back")
    ids = torch.arange(2, 15)[None]
    mask = block_causal(13, 4, torch.float64)
    assert torch.allclose(loaded.model(ids).logits, widen(model)(ids, attention_mask=mask).logits, atol=1e-10)
    theirs = type(model).from_pretrained(tmp_path / "back", config=model.config, dtype=torch.float64)
    found, expected = (widen(each)(ids, attention_mask=mask).logits for each in (theirs, model))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # not to the bit: they lie at other addresses


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in ("exact", "trajectory")])
def test_estimators_are_unbiased_within_blocks(estimator, tmp_path):
    """Weights alone decide: the mean over draws of each (block, mask)'s weight is that of ``exact``."""
    from diffdpo.noise.block_score import draw_block_plan
    from diffdpo.noise.plan import NoiseKey

    tokens, draws = [1, 3, 2], 3000
    mean: dict = {}
    for draw in range(draws):
        plan = draw_block_plan(estimator, tokens=tokens, num_samples=4, key=NoiseKey(0, 0, "r", 0, draw))
        first = 0
        for size in tokens:
            part = slice(first, first + size)
            for n in range(len(plan)):
                for i in np.flatnonzero(plan.scored_NL[n, part]):
                    key = (first, tuple(plan.masked_NL[n, part]), int(i))
                    mean[key] = mean.get(key, 0.0) + plan.weight_N[n] * plan.scale_NL[n, part][i] / draws
            first += size
    exact = draw_block_plan("exact", tokens=tokens, num_samples=1, key=NoiseKey(0, 0, "r", 0))
    assert len(exact) == 7
    first, tolerance = 0, 0.05 if estimator in ("uniform_t", "stratified_t") else 0.0  # their 1/t tail
    for size in tokens:
        part = slice(first, first + size)
        for n in range(len(exact)):
            for i in np.flatnonzero(exact.scored_NL[n, part]):
                found = mean.get((first, tuple(exact.masked_NL[n, part]), int(i)), 0.0)
                assert abs(found - exact.scale_NL[n, part][i]) < 0.03 + tolerance
        first += size
