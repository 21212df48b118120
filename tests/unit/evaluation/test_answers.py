"""Verifiers, the problems in held-out pairs, and sampled answers judged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.encode import Encoder
from data_pipeline.reader import PairLoader, open_dataset
from data_pipeline.verifiers import VERIFIERS, read_arithmetic, read_gsm8k
from diffdpo.config import TrainConfig
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.answers import answer_length, exact_match, problems_of
from diffdpo.evaluation.estimate import Estimate, paired_difference
from diffdpo.evaluation.heldout import SampledAnswers
from diffdpo.models.load import load_model

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,234", "1234"),
        ("#### $18", "18"),
        ("#### -2.5", "-2.5"),
        ("#### 1\n#### 2", "2"),
        ("18", None),
        ("#### - -5", None),
    ],
)
def test_gsm8k_answers(text, answer):
    assert read_gsm8k(text) == answer


def test_arithmetic_answers():
    assert read_arithmetic("First 2 * 3 = 6 pens. The answer is 6.") == "6" and read_arithmetic("about 6") is None


def test_a_task_that_finds_nothing_to_judge_is_refused(tiny_model, pairs_file, tmp_path):
    """No result is stated with these records, and none stands in their answers as GSM8K writes it."""
    loaded = load_model(str(tiny_model))
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "meta"}) + "\n" for row in rows))
    dataset = open_dataset(str(bare), cache_dir=tmp_path)
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    batches = list(PairLoader(dataset, encoder, seed=0, global_batch_size=8, micro_batch_size=8))
    engine = SimpleNamespace(world=WORLD)
    with pytest.raises(UserError, match=r"--eval_task gsm8k: no chosen answer"):
        SampledAnswers(TrainConfig(train_data="x", eval_task="gsm8k"), engine, loaded, batches)
    assert not SampledAnswers(TrainConfig(train_data="x"), engine, loaded, batches).problems
    assert SampledAnswers(TrainConfig(train_data="x", eval_task="arithmetic"), engine, loaded, batches).problems


def test_problems_come_from_the_pairs_and_are_judged(tiny_model, pairs_file, tmp_path):
    loaded = load_model(str(tiny_model))
    dataset = open_dataset(str(pairs_file), cache_dir=tmp_path)
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    batches = list(PairLoader(dataset, encoder, seed=0, global_batch_size=8, micro_batch_size=8))
    problems = problems_of(batches, loaded.tokenizer, "arithmetic")
    assert len(problems) == 64 and all(problem.truth.isdigit() for problem in problems)
    length = answer_length(batches)
    assert length % 16 == 0 and length >= 32
    options = {"world": WORLD, "shared_forwards": False, "gen_length": 16, "temperature": 1.0, "title": ""}
    args = (loaded.model, loaded.spec, loaded.tokenizer, problems[:4], "arithmetic")
    right, texts = exact_match(*args, seed=0, **options)
    again, same = exact_match(*args, seed=0, **options)
    assert right.shape == (4,) and texts == same and np.array_equal(right, again)
    assert exact_match(*args, seed=1, **options)[1] != texts


def test_error_bars_by_hand():
    estimate = Estimate.of([1.0, 0.0, 1.0, 1.0])
    assert (estimate.mean, estimate.count) == (0.75, 4) and estimate.stderr == pytest.approx(0.25)
    change = paired_difference([0, 0, 1, 1], [1, 0, 1, 1])
    assert change.mean == 0.25 and change.stderr == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("task", "stated", "truth"),
    [
        ("arithmetic", "33", "33"),
        ("arithmetic", "about 33", "6"),
        ("arithmetic", None, "6"),
        ("gsm8k", "1,800.00", "1800"),
        ("gsm8k", "so #### 7", "7"),
    ],
)
def test_a_stated_result_comes_before_the_answer_s_own(task, stated, truth):
    assert VERIFIERS[task].truth(stated, "The answer is 6.") == truth
