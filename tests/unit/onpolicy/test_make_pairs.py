"""make-pairs: the same file however often it is killed, by any number of processes; what is left out is told."""

import json
from dataclasses import replace

import pytest
import torch

from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from diffdpo.config import PairsConfig, make_config
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.onpolicy import answers as sampling
from diffdpo.onpolicy import make
from diffdpo.onpolicy.make import make_pairs
from diffdpo.onpolicy.questions import generated_questions, read_questions
from diffdpo.tracking.lock import alone_in

PROMPTS = [{"id": f"p{i}", "prompt": f"{i} + {i} =\n", "answer": str(2 * i)} for i in range(10)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A verifier of a user's: an answer is right where its text has an even number of characters."""
    (tmp_path / "judge_of_pairs.py").write_text(
        "def even(answer, truth, prompt):\n    return len(answer) % 2 == 0\n\n"
        "def raises(answer, truth, prompt):\n    raise ValueError('no idea')\n\n"
        "def right(answer, truth, prompt):\n    return True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "judge_of_pairs:even"


def config(tiny_model, prompts, out, **given) -> PairsConfig:
    settings = {"num_samples": 4, "gen_length": 8, "batch_size": 4, "verifier": "judge_of_pairs:even", **given}
    return make_config(
        PairsConfig,
        {"model_name_or_path": str(tiny_model), "prompts": str(prompts), "output_dir": str(out), **settings},
    )


def test_pairs_and_where_they_come_from(tiny_model, prompts, judge, tmp_path):
    said = []
    made = make_pairs(config(tiny_model, prompts, tmp_path / "out", pairing="right_wrong"), say=said.append)
    rows = [json.loads(line) for line in (made.folder / "pairs.jsonl").read_text().splitlines()]
    answered = [json.loads(line) for line in (made.folder / "answers.jsonl").read_text().splitlines()]
    assert len(answered) == 40 and [line["id"] for line in answered[:5]] == ["p0/0", "p0/1", "p0/2", "p0/3", "p1/0"]
    right = sum(len(line["answer"]) % 2 == 0 for line in answered)
    assert made.counts["right"] == right and made.counts["pairs"] == len(rows) > 0
    assert made.counts["all_right"] + made.counts["all_wrong"] + len({r["prompt"] for r in rows}) <= 10
    for row in rows:
        assert len(row["chosen"]) % 2 == 0 and len(row["rejected"]) % 2 == 1
        assert row["meta"]["scores"] == [1.0, 0.0] and row["meta"]["verifier"] == "judge_of_pairs:even"
        assert len(row["meta"]["checkpoint"]) == 16 and row["meta"]["sampler"]["temperature"] == 1.0
    assert len(open_dataset([str(made.shards)], cache_dir=tmp_path / "cache")) == len(rows)
    assert str(made.counts["all_wrong"]) in said[-1]


def test_killed_and_run_again_it_is_the_same_file(tiny_model, prompts, judge, tmp_path, monkeypatch):
    whole = make_pairs(config(tiny_model, prompts, tmp_path / "whole"), say=str)
    written, write = [], sampling.write_whole

    def dies(path, data):
        if path.parent.name == sampling.PARTS:
            written.append(path.name)
            if len(written) == 2:
                raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    assert len(list((tmp_path / "out" / sampling.PARTS).iterdir())) == 1
    again = make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    for name in ("answers.jsonl", "pairs.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_two_processes_make_what_one_makes(tiny_model, prompts, judge, tmp_path):
    """Each its share of the parts, one after the other; then rank 0 puts them together."""
    given = config(tiny_model, prompts, tmp_path / "two")
    one = make_pairs(replace(given, output_dir=str(tmp_path / "one")), say=str)
    questions = read_questions(str(prompts)).questions
    world = World(0, 0, 1, torch.device("cpu"))
    sampling.open_folder(tmp_path / "two", {}, world)
    (tmp_path / "two" / sampling.PARTS).mkdir()
    starts = range(0, len(questions), sampling.BATCHES_A_PART * given.batch_size // given.num_samples)
    for rank in (1, 0):
        for start in list(starts)[rank::2]:
            loaded = make._load(given, world)
            part = questions[start : start + starts.step]
            lines = sampling._answer(part, start, loaded, given, seed=given.seed, template="auto")
            sampling.write_whole(sampling._part(tmp_path / "two", start), sampling.as_json_lines(lines))
    sampling.sample_answers(tmp_path / "two", questions, given, world, lambda: None, seed=given.seed, template="auto")
    assert (tmp_path / "two" / "answers.jsonl").read_bytes() == (one.folder / "answers.jsonl").read_bytes()


def test_answers_are_judged_and_paired_anew_without_sampling(tiny_model, prompts, judge, tmp_path, monkeypatch):
    first = make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    monkeypatch.setattr(make, "_load", lambda *given: pytest.fail("nothing is to be sampled"))
    scores = tmp_path / "scores.jsonl"
    answered = [json.loads(line) for line in (first.folder / "answers.jsonl").read_text().splitlines()]
    scores.write_text("".join(json.dumps({"id": a["id"], "score": -len(a["answer"])}) + "\n" for a in answered))
    other = make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier=f"scores:{scores}"), say=str)
    rows = [json.loads(line) for line in (other.folder / "pairs.jsonl").read_text().splitlines()]
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in rows) and rows
    assert len(open_dataset([str(other.shards)], cache_dir=tmp_path / "cache")) == len(rows)
    scores.write_text(scores.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="no score of 39 of 40 answers, first 'p0/1'"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier=f"scores:{scores}"), say=str)


def test_scores_are_counted_and_told(tiny_model, prompts, judge, tmp_path):
    first = make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    answered = [json.loads(line) for line in (first.folder / "answers.jsonl").read_text().splitlines()]
    rows = [{"id": a["id"], "score": 0.5 if a["id"].startswith("p3") else -len(a["answer"])} for a in answered]
    scores, said = tmp_path / "scores.jsonl", []
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"id": "of nobody", "score": 1}])
    scores.write_text("\ufeff" + text, encoding="utf-8")
    made = make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier=f"scores:{scores}"), say=said.append)
    assert made.counts["of_no_answer"] == 1 and "1 scores are of no answer here" in said[-1]
    assert made.counts["without_pair"] >= 1 and "in all without a pair" in said[-1]
    for more, told in (
        ({"id": "p0/0", "score": 77}, "'p0/0' has the score 77 and, further up"),
        ({"id": "new", "score": True}, "a number"),
        ({"id": "new", "score": "1.0"}, "a number"),
        ({"id": "new", "score": 10**400}, "a number"),
    ):
        scores.write_text(text + json.dumps(more) + "\n")
        with pytest.raises(UserError, match=told):
            make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier=f"scores:{scores}"), say=str)


def test_pairs_of_an_earlier_call_are_not_taken_for_new_ones(tiny_model, prompts, judge, tmp_path):
    make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    with pytest.raises(UserError, match=r"no pair can be made.* holds the pairs of an earlier call"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier="judge_of_pairs:right"), say=str)


def test_two_at_once_in_one_folder_are_refused(tiny_model, prompts, judge, tmp_path):
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="in use by a living run"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)


def test_questions_met_again_complete_or_contradict_the_first(tmp_path):
    rows = [{"id": "a#3", "prompt": "1?"}, {"id": "a", "prompt": "2?", "answer": 7}, {"id": "a", "prompt": "3?"}]
    rows += [{"prompt": "1?", "answer": 5}, {"prompt": "2?", "answer": 8}, {"prompt": "2?", "answer": 7}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_questions(str(tmp_path / "p.jsonl"))
    assert [q.stated for q in asked.questions] == [5, 7, None] and (asked.repeated, asked.contradicted) == (3, 1)
    assert len({q.key for q in asked.questions}) == 3


def test_a_verifier_that_raises_names_prompt_and_answer_and_costs_no_answers(tiny_model, prompts, judge, tmp_path):
    with pytest.raises(DataError, match=r"'p0'.*ValueError: no idea"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier="judge_of_pairs:raises"), say=str)
    assert (tmp_path / "out" / "answers.jsonl").exists()


def test_no_pair_at_all_is_told_with_the_counts(tiny_model, prompts, judge, tmp_path):
    with pytest.raises(UserError, match="all right: 10 prompts"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out", verifier="judge_of_pairs:right"), say=str)


def test_another_sampler_in_the_same_folder_is_refused(tiny_model, prompts, judge, tmp_path):
    make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    with pytest.raises(UserError, match="temperature"):
        make_pairs(config(tiny_model, prompts, tmp_path / "out", temperature=0.5), say=str)


def test_a_kill_before_anything_was_done_is_no_obstacle(tiny_model, prompts, judge, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sampled_with.json.77.partial").write_text("{")
    make_pairs(config(tiny_model, prompts, tmp_path / "out"), say=str)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        make_pairs(config(tiny_model, prompts, tmp_path / "other"), say=str)


def test_prompts_without_a_right_result_are_told_of_before_sampling(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("Why?\n")
    with pytest.raises(UserError, match="no right result is known"):
        make_pairs(config(tiny_model, tmp_path / "prompts.txt", tmp_path / "out", verifier="arithmetic"), say=str)
    assert not (tmp_path / "out").exists()


def test_prompts_are_read_as_users_write_them(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("What is 1 + 1?\n")
    assert [q.prompt for q in read_questions(str(text)).questions] == ["What is 1 + 1?"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"prompt": "a", "answer": 3})
        + "\n"
        + json.dumps({"prompt": "b", "chosen": "The answer is 4.", "rejected": "5", "meta": {"answer": "4"}})
        + "\n"
        + json.dumps({"prompt": "a", "answer": 3})
        + "\n"
        + json.dumps({"prompt": "  "})
        + "\n"
    )
    asked = read_questions(str(rows))
    assert [(q.prompt, q.stated, q.answer) for q in asked.questions] == [("a", 3, ""), ("b", "4", "The answer is 4.")]
    assert (asked.repeated, asked.unusable) == (1, 1)
    rows.write_text("")
    with pytest.raises((UserError, DataError)):
        read_questions(str(rows))
    rows.write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        read_questions(str(rows))


def test_generated_problems_are_distinct_and_more_begin_with_fewer():
    few, more = generated_questions(20, seed=3).questions, generated_questions(50, seed=3).questions
    assert few == more[:20] and len({q.prompt for q in more}) == 50
