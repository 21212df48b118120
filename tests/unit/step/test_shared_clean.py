"""Every strategy over shared clean streams against transformers on ``[noisy | clean]`` rows of twice the length."""

import pytest
import torch

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.backward import STRATEGIES
from tests.support.block_reference import BATCH, published
from tests.support.steps import WORLD
from tests.support.wide import widen

BLOCK = 4


def loss_of(rows):
    def loss(f_R):
        score_B2 = fold(f_R, rows).score_B2
        return -torch.nn.functional.logsigmoid(0.1 * (score_B2[:, 0] - score_B2[:, 1])).sum()

    return loss


def plain_row_scores(model, rows, shift):
    """f_R by rows [noisy | clean], 2 L long, a dense mask each."""
    values = [torch.zeros((), dtype=model.lm_head.weight.dtype) for _ in range(len(rows))]
    for row in range(len(rows)):
        answer, width = int(rows.answer_R[row]), int(rows.lengths_R[row])
        start = int(rows.clean.start_A[answer])
        clean = rows.clean.ids_AT[answer, : start + width]
        noisy = torch.cat([clean[:start], rows.input_ids_RT[row, :width]])
        length = len(clean)
        of, is_clean = torch.arange(length).repeat(2) // BLOCK, torch.arange(2 * length) >= length
        seen = torch.where(
            is_clean[None, :],
            torch.where(is_clean[:, None], of[:, None] >= of[None, :], of[:, None] > of[None, :]),
            ~is_clean[:, None] & (of[:, None] == of[None, :]),
        )
        mask = torch.zeros(seen.shape, dtype=model.lm_head.weight.dtype).masked_fill(~seen, float("-inf"))
        positions = torch.arange(length).repeat(2)[None]
        out = model(torch.cat([noisy, clean])[None], attention_mask=mask[None, None], position_ids=positions)
        logp = out.logits[0].log_softmax(-1)
        for m in (rows.row_M == row).nonzero()[:, 0].tolist():
            place = start + int(rows.position_M[m])
            source = length + place - 1 if shift and place % BLOCK == 0 else place - shift
            values[row] = values[row] + float(rows.scale_M[m]) * logp[source, rows.target_M[m]]
    return torch.stack(values)


def gradients(module):
    return {name.removeprefix("model."): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["sdar", "Fast_dLLM_Qwen"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, shift = published(folder, request.param, BLOCK)
    widen(model.float())
    spec = load_model(folder).spec
    rows = NoiseOptions("mask_count", 4, 0, spec.mask_token_id, None, BLOCK).draw_rows(BATCH, torch.device("cpu"))
    f_R = plain_row_scores(model, rows, shift)
    loss_of(rows)(f_R).backward()
    return folder, rows, f_R.detach(), {name: p.grad for name, p in model.named_parameters()}


def engine_of(folder, **options):
    loaded = load_model(folder)
    loaded.model.requires_grad_(True)
    return PlainEngine(MaskedLogProbs(loaded.model, loaded.spec, **options), WORLD, OptimizerOptions(learning_rate=0.0))


def distance(found, expected):
    assert found.keys() == expected.keys()
    a, b = (torch.cat([part[name].flatten().double() for name in expected]) for part in (found, expected))
    return float((a - b).norm() / b.norm())


SIZES = {"one row": {"rows": 1}, "three rows": {"rows": 3}, "all": {}, "tokens": {"tokens": 40}}


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_plain_rows(case, size):
    folder, rows, expected, _ = case
    f_R = score_rows(engine_of(folder), rows, segments=Segments(**SIZES[size]))
    assert (f_R - expected).abs().max() <= 1e-6 * expected.abs().max() * 10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_plain_rows(case, strategy, size):
    folder, rows, f_plain, expected = case
    engine = engine_of(folder)
    f_R = STRATEGIES[strategy](engine, rows, loss_of(rows), segments=Segments(**SIZES[size]), last=True)
    assert torch.allclose(f_R, f_plain, rtol=1e-5, atol=1e-5)
    assert distance(gradients(engine.module), expected) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_with_layer_checkpointing(case, strategy):
    folder, rows, _, expected = case
    engine = engine_of(folder, layer_checkpointing=True)
    STRATEGIES[strategy](engine, rows, loss_of(rows), segments=Segments(rows=2), last=True)
    assert distance(gradients(engine.module), expected) <= 1e-5


@pytest.mark.parametrize("targets", [None, "q_proj,o_proj"])
def test_an_adapter_gets_the_same_gradient_from_every_strategy(case, targets):
    folder, rows, _, _ = case
    found = {}
    for strategy in STRATEGIES:
        loaded = load_model(folder)
        torch.manual_seed(0)
        adapted = add_lora(loaded.model, loaded.spec, r=2, target_modules=targets)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        engine = PlainEngine(MaskedLogProbs(adapted, loaded.spec), WORLD, OptimizerOptions(learning_rate=0.0))
        STRATEGIES[strategy](engine, rows, loss_of(rows), segments=Segments(rows=2), last=True)
        found[strategy] = gradients(engine.module)
    assert all(distance(found[name], found["none"]) <= 1e-5 for name in found)


def test_clean_tokens_are_run_once_a_pair(case):
    """P + 2 (A + n A) tokens, less what is shared of the answers and the last blocks, which nobody looks back on."""
    folder, rows, _, _ = case
    engine = engine_of(folder)
    score_rows(engine, rows, segments=Segments(rows=1))
    clean = rows.clean
    once = int(clean.length_A.sum() - clean.shared_A[::2].sum())
    assert engine.module.counted.computed == once + int(rows.lengths_R.sum())
    assert int(clean.shared_A[0]) == 8 and int(clean.shared_A[2]) == 4


def test_rows_without_their_clean_tokens_are_an_error(case):
    folder, rows, _, _ = case
    with pytest.raises(ValueError, match="block-causal"):
        engine_of(folder)(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)


def test_queries_in_several_chunks(case, monkeypatch):
    """Sequences here are shorter than a chunk; of one block each, chunks are as many as there can be."""
    monkeypatch.setattr("diffdpo.models.architecture.block_layout.CHUNK", 1)
    folder, rows, f_plain, expected = case
    engine = engine_of(folder)
    f_R = STRATEGIES["two_pass"](engine, rows, loss_of(rows), segments=Segments(rows=2), last=True)
    assert torch.allclose(f_R, f_plain, rtol=1e-5, atol=1e-5)
    assert distance(gradients(engine.module), expected) <= 1e-5


SLOW_FLEX = [pytest.param(name, marks=[] if name in ("none", "deferred") else pytest.mark.slow) for name in STRATEGIES]


@pytest.mark.parametrize("strategy", SLOW_FLEX)
def test_flex_attention_hides_the_same(case, strategy, monkeypatch):
    """torch's own meaning of FlexAttention, uncompiled: on a CPU it refuses gradients, though it can compute them."""
    from torch.nn.attention import flex_attention as flex

    from diffdpo.models.architecture import block_attention

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(block_attention, "compiled_flex", lambda: flex.flex_attention)
    folder, rows, f_plain, expected = case
    engine = engine_of(folder, flex=True)
    f_R = STRATEGIES[strategy](engine, rows, loss_of(rows), segments=Segments(rows=3), last=True)
    assert torch.allclose(f_R, f_plain, rtol=1e-5, atol=1e-5)
    assert distance(gradients(engine.module), expected) <= 1e-5
