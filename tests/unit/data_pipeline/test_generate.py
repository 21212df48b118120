"""Generated data: deterministic, right where it says so, wrong where it should be, and never on both sides."""

import numpy as np
import pytest

from data_pipeline import generate
from data_pipeline.arithmetic import FLAWS, PROBLEM_KINDS, Result, Step, clear_answer, draw_problem, solve
from data_pipeline.errors import DataError
from data_pipeline.generate import generate_corpus, generate_pairs, question_split
from data_pipeline.verifiers import read_answer


def evaluate(text: str) -> list[bool]:
    """Whether each 'a op b = c' of a worked answer is true."""
    lines = [part.split(" = ") for part in text.split(". ") if " = " in part]
    sums = [(left.split(" ", 1)[1].replace("/", "//"), right.split(" ")[0]) for left, right in lines]
    return [eval(left) == int(right) for left, right in sums]  # our own digits and operators


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_clear_answers_are_right(difficulty):
    for record in generate_pairs(200, seed=1, difficulties=[difficulty]):
        assert all(evaluate(record["chosen"])) and evaluate(record["chosen"])
        assert str(read_answer(record["chosen"])) == record["meta"]["answer"]


def test_each_flaw_is_what_it_is_called():
    for record in generate_pairs(400, seed=2):
        flaw, chosen, rejected = record["meta"]["flaw"], record["chosen"], record["rejected"]
        if flaw == "wrong_step":
            assert evaluate(rejected).count(False) == 1 and read_answer(rejected) != read_answer(chosen)
        elif flaw == "cut_short":
            assert chosen.startswith(rejected) and read_answer(rejected) is None
        elif flaw == "vague":
            assert " = " not in rejected and read_answer(rejected) is None
        else:
            assert read_answer(rejected) == read_answer(chosen) and len(rejected) > 1.5 * len(chosen)


def test_a_slip_carries_through():
    steps = (Step(3, "*", 4), Step(Result(0), "+", 5))
    assert solve(steps) == [(3, "*", 4, 12), (12, "+", 5, 17)]
    assert solve(steps, {0: 13}) == [(3, "*", 4, 13), (13, "+", 5, 18)]


def test_same_seed_same_records_and_a_prefix_is_a_prefix():
    assert list(generate_pairs(50, seed=3)) == list(generate_pairs(80, seed=3))[:50]
    assert list(generate_pairs(50, seed=3)) != list(generate_pairs(50, seed=4))


def test_no_question_in_both_splits():
    train = {record["prompt"] for record in generate_corpus(3000, seed=0)}
    train |= {record["prompt"] for record in generate_pairs(3000, seed=0)}
    held_out = {record["prompt"] for record in generate_pairs(600, seed=0, split="eval")}
    assert not train & held_out and all(question_split(prompt.strip()) == "eval" for prompt in held_out)


def test_every_kind_occurs_and_options_restrict():
    pairs = list(generate_pairs(200, seed=0))
    assert {p["meta"]["problem"] for p in pairs} == set(PROBLEM_KINDS) and {p["meta"]["flaw"] for p in pairs} == set(
        FLAWS
    )
    only = list(generate_pairs(50, seed=0, kinds=["give"], flaws=["vague"]))
    assert {(p["meta"]["problem"], p["meta"]["flaw"]) for p in only} == {("give", "vague")}


def test_hard_problems_have_a_third_step():
    rng = np.random.Generator(np.random.Philox(0))
    problems = [draw_problem(rng, kinds=tuple(PROBLEM_KINDS), difficulty="hard") for _ in range(100)]
    assert {len(problem.steps) for problem in problems} == {2, 3}
    assert all("Last" in clear_answer(p) for p in problems if len(p.steps) == 3)


@pytest.mark.parametrize(
    ("text", "answer"), [("The answer is 12.", 12), ("The answer is about 12.", None), ("12", None)]
)
def test_reading_an_answer(text, answer):
    assert read_answer(text) == answer


def test_the_command_writes_the_same_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        generate.main(["--count", "20", "--seed", "5", "--out", str(tmp_path / name)])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_the_mix_of_qualities():
    records = list(generate_corpus(400, seed=0, mix=generate.parse_mix("clear=1,vague=3")))
    share = sum(record["meta"]["quality"] == "vague" for record in records) / 400
    assert {record["meta"]["quality"] for record in records} == {"clear", "vague"} and 0.68 < share < 0.82
    for wrong in ("clear", "clear=x", "nice=1", "clear=-1", "clear=0", ""):
        with pytest.raises(DataError):
            generate.parse_mix(wrong)


@pytest.mark.parametrize("argv", [["--kinds", "nope"], ["--flaws", ""], ["--difficulty", "x"], ["--count", "0"]])
def test_wrong_options_are_named(argv):
    with pytest.raises(DataError):
        generate.main(argv)
