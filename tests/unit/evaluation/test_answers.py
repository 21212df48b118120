"""Verifiers, the problems in held-out pairs, and sampled answers judged."""

import json

import pytest
import torch

from data_pipeline.reader import open_dataset
from data_pipeline.verifiers import VERIFIERS, read_arithmetic, read_gsm8k
from diffdpo.config import TrainConfig
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.estimate import Estimate, paired_difference
from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.evaluation.tasks.exact_match import ExactMatch
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_model
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import Segments
from diffdpo.settings.base import check_settings
from diffdpo.setup import data as run_data

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


def tasks_of(tiny_model, file, cache, **settings):
    """The tasks of a run of this model on these held-out records."""
    config = TrainConfig(model_name_or_path=str(tiny_model), max_length=128, max_prompt_length=64, **settings)
    loaded = load_model(str(tiny_model))
    dataset, encoder = open_dataset(str(file), cache_dir=cache), make_encoder(config, loaded.tokenizer, loaded.spec)
    batches = run_data.eval_batches(config, dataset, encoder, WORLD)
    engine = PlainEngine(MaskedLogProbs(loaded.model, loaded.spec), WORLD, OptimizerOptions(learning_rate=1e-3))
    records = run_data.held_out_records(dataset, batches, WORLD)
    return HeldOutTasks(config, engine, loaded, encoder, records=records, batches=batches, segments=Segments(rows=8))


def test_a_task_that_finds_nothing_to_judge_is_refused(tiny_model, pairs_file, tmp_path):
    """No result is stated with these records, and none stands in their answers as GSM8K writes it."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "meta"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"--eval_task gsm8k: none of the held-out records"):
        tasks_of(tiny_model, bare, tmp_path, train_data="x", eval_task="gsm8k")
    assert not tasks_of(tiny_model, bare, tmp_path, train_data="x").tasks
    assert tasks_of(tiny_model, bare, tmp_path, train_data="x", eval_task="arithmetic").tasks
    with pytest.raises(UserError, match="is arithmetic meant"):
        check_settings(TrainConfig(eval_task="arithmetik"))


def test_problems_come_from_the_records_and_are_judged(tiny_model, pairs_file, tmp_path):
    tasks = tasks_of(tiny_model, pairs_file, tmp_path, eval_task="arithmetic")
    task = tasks.tasks["exact_match"]
    assert len(task.problems) == 64 and all(problem.truth.isdigit() for problem in task.problems)
    assert tasks.length % 16 == 0 and tasks.length >= 32 and task.sampler["gen_length"] == tasks.length
    small = ExactMatch("arithmetic", task.problems[:4], task.verifier, {"gen_length": 16, "temperature": 1.0})
    lines = small.lines(tasks.subject, range(4))
    assert [line["id"] for line in lines] == [problem.id for problem in task.problems[:4]]
    one_by_one = [line for number in (3, 1, 0, 2) for line in small.lines(tasks.subject, [number])]
    assert sorted(one_by_one, key=lambda line: line["id"]) == sorted(lines, key=lambda line: line["id"])
    other = ExactMatch("arithmetic", task.problems[:4], task.verifier, {"gen_length": 16, "temperature": 1.0}, seed=1)
    assert [line["answer"] for line in other.lines(tasks.subject, range(4))] != [line["answer"] for line in lines]


def test_fewer_problems_than_were_asked_for_are_told(tiny_model, pairs_file, tmp_path):
    def fewer(**settings):
        named = f"arithmetic,number@{pairs_file}"
        return tasks_of(tiny_model, pairs_file, tmp_path, eval_task=named, **settings).fewer()

    assert not fewer(num_eval_problems=8, max_eval_pairs=8) and not fewer(num_eval_problems=0)
    (capped,) = fewer(num_eval_problems=20, max_eval_pairs=8)
    assert capped.startswith("exact_match/arithmetic: 8 problems, not the 20") and "--max_eval_pairs takes 8" in capped
    first, second = fewer(num_eval_problems=1000, max_eval_pairs=0)
    assert "64 problems" in first and "max_eval_pairs" not in first and str(pairs_file) in second


def test_several_tasks_have_names_of_their_own(tiny_model, pairs_file, tmp_path):
    settings = {"num_eval_problems": 3, "max_eval_pairs": 8}
    named = f"arithmetic,number@{pairs_file},multiple_choice"
    tasks = tasks_of(tiny_model, pairs_file, tmp_path, eval_task=named, **settings)
    assert list(tasks.tasks) == ["exact_match/arithmetic", "exact_match/number", "multiple_choice"]
    values = tasks.values("now")
    assert [len(each) for each in values.values()] == [3, 3, 3] and tasks.task == named
    assert not tasks.decide
    settings |= {"early_stopping_patience": 2, "metric_for_best_model": "multiple_choice"}
    assert tasks_of(tiny_model, pairs_file, tmp_path, eval_task="multiple_choice", **settings).decide


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
