"""The model class of lm-evaluation-harness: what a log-likelihood depends on and what not, and the command."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from benchmarks.choice_accuracy import published
from data_pipeline.generate import generate_choices
from diffdpo.evaluation.lm_eval import DiffusionLM
from diffdpo.evaluation.score_answers import NamedAnswer
from diffdpo.sampling.decode import sample

ROWS = list(generate_choices(4, seed=2))


def request(context, continuation, doc=None, kind="loglikelihood"):
    return Instance(kind, doc or {}, (context, continuation), 0)


def requests_of(rows=ROWS):
    return [request(row["question"], choice, row) for row in rows for choice in row["choices"]]


@pytest.fixture(scope="module")
def lm(tiny_model):
    return DiffusionLM(str(tiny_model), num_mc_samples=8, device="cpu")


def test_results_depend_on_neither_batch_nor_order_nor_company(lm, tiny_model):
    requests = requests_of()
    whole = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = lm.loglikelihood([requests[i] for i in order], disable_tqdm=True)
    small = DiffusionLM(str(tiny_model), num_mc_samples=8, device="cpu", batch_size=3)
    alone = [small.loglikelihood([each], disable_tqdm=True)[0][0] for each in requests[:5]]
    assert [score for score, _ in shuffled] == pytest.approx([whole[i] for i in order], rel=1e-5)
    assert alone == pytest.approx(whole[:5], rel=1e-5)
    other = DiffusionLM(str(tiny_model), num_mc_samples=8, device="cpu", seed=1)
    assert other.loglikelihood(requests[:1], disable_tqdm=True)[0][0] != pytest.approx(whole[0], rel=1e-5)


def test_choices_of_one_question_share_their_noise(lm):
    """The same continuation after another question has other masks; as another choice of the same one the same."""
    one, twin = request("2 + 2 =", " a b c d e f", {"q": 1}), request("2 + 2 =", " a b c d e f", {"q": 1})
    other = request("2 + 2 =", " a b c d e f", {"q": 2})
    first, second, third = (score for score, _ in lm.loglikelihood([one, twin, other], disable_tqdm=True))
    assert first == second and third != pytest.approx(first, rel=1e-6)


def test_one_token_takes_one_forward_and_is_exact(lm):
    token = lm.tok_encode(" a", add_special_tokens=False)[:1]
    text = lm.tokenizer.decode(token)
    context = "2 + 2 = 4"
    before = lm.module.counted.computed
    ((score, greedy),) = lm.loglikelihood([request(context, text)], disable_tqdm=True)
    prompt, answer = lm._encode_pair(context, text)
    assert len(answer) == 1 and lm.module.counted.computed - before <= len(prompt) + 1 + 1  # and an absent side's token
    row = torch.tensor([[*prompt, lm.spec.mask_token_id]])
    with torch.no_grad():
        expected = torch.log_softmax(lm.loaded.model(row).logits[0, -1].float(), -1)[answer[0]]
    assert score == pytest.approx(float(expected), rel=1e-5) and greedy is False
    info = lm.get_model_info()
    assert info["loglikelihoods_exact"] >= 1


def test_the_sampler_s_order_is_exact_for_every_length(tiny_model):
    lm = DiffusionLM(str(tiny_model), score_estimator="sampler_order", device="cpu")
    found = [score for score, _ in lm.loglikelihood(requests_of()[:4], disable_tqdm=True)]
    other = DiffusionLM(str(tiny_model), score_estimator="sampler_order", device="cpu", seed=1, num_mc_samples=2)
    assert found == [score for score, _ in other.loglikelihood(requests_of()[:4], disable_tqdm=True)]
    info = lm.get_model_info()
    assert info["loglikelihoods_estimated"] == 0 < info["loglikelihoods_exact"] and "exact" in info["loglikelihood"]


def test_it_agrees_with_llada_s_published_estimate(lm):
    """Within the error of 20 draws of 32 samples each: the two estimate the same bound."""
    row, generator = ROWS[0], torch.Generator().manual_seed(0)
    prompt, answer = lm._encode_pair(row["question"], row["choices"][0])
    named = NamedAnswer("", [*prompt, *answer], len(prompt))
    theirs = [published(lm.loaded, named, 32, generator) for _ in range(20)]
    ours = [
        DiffusionLM.loglikelihood(lm, [request(row["question"], row["choices"][0], {"draw": i})], True)[0][0]
        for i in range(40)
    ]
    gap = np.mean(ours) - np.mean(theirs)
    error = np.hypot(np.std(ours, ddof=1) / 40**0.5, np.std(theirs, ddof=1) / 20**0.5)
    assert abs(gap) < 4 * error
    assert lm.errors.known and lm.get_model_info()["noise_stderr_mean"] > 0


def test_rolling_is_a_sum_over_windows(lm, tiny_model):
    text = " ".join(row["question"] for row in ROWS[:1])
    (whole,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    short = DiffusionLM(str(tiny_model), num_mc_samples=8, device="cpu", max_length=20)
    windows = list(short._windows(Instance("loglikelihood_rolling", {}, (text,), 0)))
    assert sum(len(each.ids) - each.prompt_length for each in windows) == len(lm.tok_encode(text, False))
    assert max(len(each.ids) for each in windows) <= 20 and whole < 0
    assert len({each.noise for each in windows}) == len(windows)
    assert all(a.noise != b.noise for a, b in pairwise(windows))


def test_answers_are_sampled_and_cut_at_their_stops(lm):
    settings = {"until": ["zzz"], "max_gen_toks": 16}
    asked = [Instance("generate_until", {}, (row["question"], settings), 0) for row in ROWS]
    texts = lm.generate_until(asked, disable_tqdm=True)
    assert texts == [lm.generate_until([each], disable_tqdm=True)[0] for each in asked]
    stop = next(text[1] for text in texts if len(text) > 1)
    cut = lm.generate_until(
        [Instance("generate_until", {}, (row["question"], settings | {"until": [stop]}), 0) for row in ROWS], True
    )
    assert cut == [text.split(stop)[0] for text in texts]


def test_greedy_says_whether_the_sampler_would_write_it(tiny_model):
    lm = DiffusionLM(str(tiny_model), num_mc_samples=2, device="cpu", greedy=True)
    prompt = lm.tok_encode(ROWS[0]["question"])
    (written,) = sample(lm.loaded.model, lm.spec, [prompt], gen_length=3, steps=3, block_length=3, on_eos="forbid")
    plain = sample(lm.loaded.model, lm.spec, [prompt], gen_length=3, steps=3, block_length=3)[0]
    assert lm._is_greedy(NamedAnswer("", [*prompt, *written], len(prompt))) is (plain == written)
    assert lm._is_greedy(NamedAnswer("", [*prompt, *plain], len(prompt))) is (len(plain) == 3)
    assert len(plain) == 3, "a model that ends at once shows nothing"
    assert lm.loglikelihood([request("2 + 2 =", " no such answer")], disable_tqdm=True)[0][1] is False


def test_chat_templates_are_the_tokenizer_s(lm):
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi"
        assert lm.chat_template(True) == lm.tokenizer.chat_template and lm.tokenizer_name
    finally:
        lm.tokenizer.chat_template = None


TASK = """task: worked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_model, tmp_path, command, python, free_port):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    (tmp_path / "worked.yaml").write_text(TASK.format(file=file))
    words = ["lm-eval", "run", "--model", "diffdpo", "--model_args", f"pretrained={tiny_model},num_mc_samples=4"]
    words += ["--tasks", "worked", "--include_path", str(tmp_path), "--batch_size", "2", "--log_samples"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    found = []
    for name, start in (("one", []), ("two", launcher)):
        done = command(
            [python, *start, "-m", "diffdpo", *words, "--output_path", str(tmp_path / name)],
            timeout=240,
            HF_DATASETS_CACHE=str(tmp_path / "cache"),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (samples,) = (tmp_path / name).rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found.append({line["doc"]["id"]: [float(r[0][0]) for r in line["resps"]] for line in lines})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3
    for key, values in found[0].items():
        assert found[1][key] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_mc_sample": "8"}, r"there is no num_mc_sample \(is num_mc_samples meant\?\); allowed: "),
        ({"block_lenght": 16}, r"there is no block_lenght \(is block_length meant\?\); allowed: "),
        ({"num_mc_samples": "x"}, "num_mc_samples is 'x'; it must be a whole number"),
        ({"threshold": "high"}, "threshold is 'high'; it must be a number"),
        ({"score_estimator": "foo"}, "foo"),
    ],
)
def test_what_nothing_reads_is_refused_before_a_model_is(given, said, monkeypatch):
    from diffdpo.errors import UserError
    from diffdpo.evaluation import lm_eval as ours

    monkeypatch.setattr(ours, "load_model", lambda *_, **__: pytest.fail("a model was read"))
    with pytest.raises(UserError, match=said):
        ours.DiffusionLM(**given)
