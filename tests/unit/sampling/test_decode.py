import copy
import dataclasses

import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.sampling.canvas import Canvas
from diffdpo.sampling.confidence import ORDERS
from diffdpo.sampling.decode import BYTES_A_LOGIT, Decoding, sample
from diffdpo.sampling.predict import BlockPredictor

MASK, EOS, VOCAB = 59, 1, 60
SPEC = FamilySpec("llada", MASK, EOS, EOS, "LLaDABlock", LLADA_LORA_TARGETS)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3] * 9]
SMALL = {"gen_length": 16, "steps": 16, "block_length": 8}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LLaDAConfig.create(
        d_model=32, n_layers=2, n_heads=4, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS
    )
    model = LLaDAModelLM(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model


@torch.no_grad()
def plain_sample(model, prompt, *, gen_length, steps, block_length, cfg_scale=0.0, shift=0):
    """LLaDA's published procedure, one prompt, greedy: full logits every step, everything recomputed."""
    x = torch.tensor([prompt + [MASK] * gen_length])
    blocks = gen_length // block_length
    per_block = steps // blocks
    for block in range(blocks):
        stop = len(prompt) + (block + 1) * block_length
        base, extra = divmod(block_length, per_block)
        for step in range(per_block):
            logits = model(x).logits[0]
            if cfg_scale:
                blank = x.clone()
                blank[0, : len(prompt)] = MASK
                free = model(blank).logits[0]
                logits = free + (cfg_scale + 1) * (logits - free)
            logits[:, MASK] = -torch.inf
            logits = logits.roll(shift, dims=0)
            confidence, token = logits.softmax(-1).max(-1)
            masked = x[0] == MASK
            masked[stop:] = False
            confidence[~masked] = -torch.inf
            for position in confidence.topk(base + (step < extra)).indices:
                x[0, position] = token[position]
    answer = x[0, len(prompt) :].tolist()
    return answer[: answer.index(EOS)] if EOS in answer else answer


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "options",
    [SMALL, SMALL | {"steps": 4}, SMALL | {"steps": 6}, SMALL | {"cfg_scale": 1.5}, SMALL | {"block_length": 16}],
)
def test_greedy_answers_are_those_of_the_published_procedure(model, options, shift):
    spec = dataclasses.replace(SPEC, logit_shift=shift)
    expected = [plain_sample(model, prompt, **options, shift=shift) for prompt in PROMPTS]
    assert sample(model, spec, PROMPTS, **options) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "cfg_scale": 1.0},
        {"remasking": "random"},
        {"remasking": "entropy", "temperature": 0.7},
        {"remasking": "top_margin"},
        {"threshold": 0.3, "temperature": 1.0},
        {"block_cache": True, "cfg_scale": 0.5, "temperature": 1.0},
    ],
)
@pytest.mark.parametrize("shift", [0, 1])
def test_answers_do_not_depend_on_the_batch(model, options, shift):
    spec = dataclasses.replace(SPEC, logit_shift=shift)
    options = SMALL | options
    together = sample(model, spec, PROMPTS, seed=7, **options)
    assert together == sample(model, spec, PROMPTS, seed=7, batch_size=2, **options)
    seeds = [11, 12, 13]
    alone = [sample(model, spec, [p], seed=[s], **options)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert sample(model, spec, PROMPTS, seed=seeds, **options) == alone


@pytest.mark.parametrize("order", [*ORDERS, "random"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_the_budget_of_the_logits_changes_no_answer(model, order, cfg_scale):
    options = SMALL | {"remasking": order, "temperature": 0.8, "cfg_scale": cfg_scale, "steps": 4}
    whole = sample(model, SPEC, PROMPTS, **options)
    largest = []
    handle = model.head.register_forward_hook(lambda _, __, logits: largest.append(len(logits)))
    parts = sample(model, SPEC, PROMPTS, logits_budget=3 * VOCAB * BYTES_A_LOGIT, **options)
    handle.remove()
    assert parts == whole
    assert max(largest) == 3 * (1 + (cfg_scale > 0))


def test_seed_and_temperature_matter(model):
    same, other = (sample(model, SPEC, PROMPTS, seed=seed, temperature=1.0, **SMALL) for seed in (0, 1))
    assert same == sample(model, SPEC, PROMPTS, seed=0, temperature=1.0, **SMALL)
    assert same != other
    twins = sample(model, SPEC, [PROMPTS[0]] * 2, temperature=1.0, **SMALL)
    assert twins[0] != twins[1]


def test_block_cache_with_one_step_a_block_is_exact(model):
    options = SMALL | {"steps": 2}
    assert sample(model, SPEC, PROMPTS, block_cache=True, **options) == sample(model, SPEC, PROMPTS, **options)


def test_cache_equals_a_full_forward_when_the_block_is_everything_that_changes(model):
    """One layer: keys and values of the rest do not depend on the block, so the cache is exact."""
    config = LLaDAConfig.create(
        d_model=32, n_layers=1, n_heads=4, vocab_size=VOCAB, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS
    )
    torch.manual_seed(1)
    shallow = LLaDAModelLM(config).double()
    for shift in (0, 1):
        spec = dataclasses.replace(SPEC, logit_shift=shift)
        for cfg_scale in (0.0, 1.0):
            options = SMALL | {"cfg_scale": cfg_scale, "temperature": 1.0}
            plain, cached = (sample(shallow, spec, PROMPTS, block_cache=on, **options) for on in (False, True))
            assert plain == cached


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_cached_forward_of_an_unchanged_canvas_equals_the_full_one(model, shift, cfg_scale):
    spec = dataclasses.replace(SPEC, logit_shift=shift)
    canvas = Canvas(PROMPTS, [(0,), (1,), (2,)], spec=spec, gen_length=16)
    window = canvas.window(8, 8)
    predictor = BlockPredictor(model, spec, canvas, window, cfg_scale=cfg_scale, cached=True)
    with torch.no_grad():
        full = predictor.logits(predictor.hidden_states(*canvas.masked(window).nonzero(as_tuple=True)))
        row, column = torch.tensor([0, 2, 2]), torch.tensor([3, 0, 7])
        again = predictor.logits(predictor.hidden_states(row, column))
    assert torch.allclose(again, full[row * 8 + column], atol=1e-12)


def test_threshold_takes_fewer_forwards_and_one_near_one_is_sequential(model):
    forwards = []
    handle = model.final_norm.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for threshold in (None, 0.999999999, 0.05):
        forwards.clear()
        sample(model, SPEC, PROMPTS[:1], on_eos="forbid", threshold=threshold, **SMALL)
        counts.append(len(forwards))
    handle.remove()
    assert counts[0] == counts[1] == 16
    assert counts[2] < 16


def test_mask_is_never_an_answer_and_eos_can_be_forbidden(model):
    for temperature in (0.0, 2.0):
        answers = sample(model, SPEC, PROMPTS, temperature=temperature, on_eos="forbid", **SMALL)
        assert all(len(answer) == 16 and MASK not in answer and EOS not in answer for answer in answers)


@pytest.fixture
def with_head(model):
    """Replace the model's head by a function of the number of positions."""
    modules, calls = model.model.transformer, []
    original = modules["ff_out"]

    class Head(torch.nn.Module):
        def forward(self, hidden):
            calls.append(len(hidden))
            return self.logits(len(hidden))

    def replace(logits):
        Head.logits = staticmethod(logits)
        modules["ff_out"] = Head()
        return calls

    yield replace
    modules["ff_out"] = original


def test_forced_terminator_ends_the_answer_early(model, with_head):
    calls = with_head(lambda count: torch.eye(VOCAB)[EOS].mul(5).expand(count, -1).clone())
    assert sample(model, SPEC, PROMPTS, **SMALL) == [[], [], []]
    assert len(calls) < 16


@pytest.mark.parametrize(("on_eos", "early"), [("allow", True), ("last", False)])
def test_terminator_last_fills_the_other_positions_first(model, with_head, on_eos, early):
    """Every second masked position is sure to end, the others less sure of token 7."""

    def logits(count):
        even = torch.arange(count) % 2 == 0
        return torch.where(even[:, None], 9 * torch.eye(VOCAB)[EOS], 4 * torch.eye(VOCAB)[7])

    with_head(logits)
    frames = []
    options = SMALL | {"block_length": 16, "on_eos": on_eos}
    sample(model, SPEC, PROMPTS[:1], on_step=lambda _, tokens: frames.append(tokens), **options)
    assert (EOS in frames[0]) == early
    if not early:
        assert len(frames) == 16 and all(EOS not in frame for frame in frames[:-1])


def test_on_step_shows_the_canvas_filling(model):
    seen = {}
    answers = sample(
        model, SPEC, PROMPTS, batch_size=2, on_step=lambda i, tokens: seen.setdefault(i, []).append(tokens), **SMALL
    )
    assert set(seen) == {0, 1, 2}
    for i, frames in seen.items():
        masks = [frame.count(MASK) for frame in frames]
        assert masks == sorted(masks, reverse=True)
        assert frames[-1][: len(answers[i])] == answers[i]


def test_training_mode_is_restored_and_no_prompts_no_answers(model):
    model.train()
    assert sample(model, SPEC, [], **SMALL) == []
    assert model.training
    model.eval()


def test_reveal_counts_are_even_with_the_remainder_first():
    assert Decoding(gen_length=16, steps=6, block_length=8).reveal_counts() == [3, 3, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gen_length": 0}, "gen_length is 0"),
        ({"block_length": 7}, "block_length 7 must divide"),
        ({"steps": 3}, "multiple of the 4 blocks"),
        ({"temperature": -1.0}, "temperature"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"gen_length": 4096, "steps": 4096, "block_length": 64}, "prompt 0: it has 3 tokens .* context of 4096"),
        ({"remasking": "best"}, "low_confidence, top_margin, entropy, random"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": 0.9, "remasking": "entropy"}, "threshold needs"),
        ({"on_eos": "never"}, "allow, last, forbid"),
    ],
)
def test_user_errors(model, options, words):
    with pytest.raises(UserError, match=words):
        sample(model, SPEC, PROMPTS, **options)


def test_answers_are_told_batch_by_batch_in_order(model):
    told = []
    answers = sample(model, SPEC, PROMPTS, batch_size=2, on_answer=lambda i, tokens: told.append((i, tokens)), **SMALL)
    assert told == list(enumerate(answers))


def test_shifted_models_need_a_prompt_and_seeds_must_match(model):
    with pytest.raises(UserError, match="empty prompt"):
        sample(model, dataclasses.replace(SPEC, logit_shift=1), [[]], **SMALL)
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        sample(model, SPEC, PROMPTS, seed=[1, 2], **SMALL)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_a_model_whose_logits_are_not_finite_answers_nothing(model, damage, order):
    damaged = copy.deepcopy(model)
    next(damaged.parameters()).data[7] = damage
    with pytest.raises(UserError, match="not finite"):
        sample(damaged, SPEC, PROMPTS, **SMALL, remasking=order)
