"""Block-causal sampling with kept blocks against recomputing everything, one prompt at a time, at every step."""

import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from diffdpo.sampling.decode import sample
from tests.support.block_reference import EOS, MASK, published

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3] * 9, [12]]
GEN = 14


@pytest.fixture(scope="module", params=[("sdar", 4), ("Fast_dLLM_Qwen", 4), ("sdar", 5)], ids=str)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    published(folder, *request.param)
    return load_model(folder, dtype="float64")


@torch.no_grad()
def plain(loaded, prompt, *, per_step, threshold=None):
    """The whole sequence up to the current block through the block-causal forward at each step; greedy."""
    model, block, shift = loaded.model, loaded.spec.block_size, loaded.spec.logit_shift
    stop_all = -(-(len(prompt) + GEN) // block) * block
    x = prompt + [MASK] * (stop_all - len(prompt))
    for first in range(len(prompt) // block * block, stop_all, block):
        while MASK in x[first : first + block]:
            answer = x[len(prompt) :][:GEN]
            if EOS in answer and MASK not in answer[: answer.index(EOS)]:
                break
            logits = model(torch.tensor([x[: first + block]])).logits[0]
            logits[:, MASK] = -torch.inf
            masked = [i for i in range(first, first + block) if x[i] == MASK]
            sure = {i: logits[i - shift].softmax(-1).max(-1) for i in masked}
            order = sorted(masked, key=lambda i: -float(sure[i].values))
            above = [i for i in masked if threshold and float(sure[i].values) > threshold]
            for i in {*order[:per_step], *above}:
                x[i] = int(sure[i].indices)
    answer = x[len(prompt) :][:GEN]
    return answer[: answer.index(EOS)] if EOS in answer else answer


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_kept_blocks_give_the_tokens_of_recomputing_all(loaded, threshold):
    options = {"gen_length": GEN, "steps": GEN, "threshold": threshold}
    answers = sample(loaded.model, loaded.spec, PROMPTS, **options)
    assert answers == [plain(loaded, prompt, per_step=1, threshold=threshold) for prompt in PROMPTS]
    assert sample(loaded.model, loaded.spec, PROMPTS, batch_size=1, **options) == answers
    assert any(len(answer) == GEN for answer in answers)


def test_noise_is_a_prompt_s_own(loaded):
    options = {"gen_length": GEN, "steps": GEN, "temperature": 1.0, "seed": 3}
    answers = sample(loaded.model, loaded.spec, PROMPTS, **options)
    assert sample(loaded.model, loaded.spec, PROMPTS, batch_size=2, **options) == answers
    assert all(MASK not in answer for answer in answers)


def test_two_tokens_a_step(loaded):
    if loaded.spec.block_size != 4:
        pytest.skip("an even block")
    answers = sample(loaded.model, loaded.spec, PROMPTS, gen_length=GEN, steps=GEN // 2)
    assert answers == [plain(loaded, prompt, per_step=2) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_length": 7}, "blocks of . tokens, not of 7"),
        ({"block_cache": True}, "leave block_cache out"),
        ({"cfg_scale": 1.0}, "leave cfg_scale out"),
    ],
)
def test_options_without_a_meaning_are_refused(loaded, options, words):
    with pytest.raises(UserError, match=words):
        sample(loaded.model, loaded.spec, PROMPTS, gen_length=GEN, steps=GEN, **options)
