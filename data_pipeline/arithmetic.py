"""Word problems in arithmetic, their worked answers, and the four ways in which an answer can be worse.

A problem is a question and a chain of steps whose operands are numbers or earlier results, so that a wrong step
carries through to a wrong final answer exactly as it would for a pupil. Every draw comes from the generator passed in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.verifiers import ANSWER_MARK

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Ben", "Eva", "Sam", "Ida", "Max", "Lea", "Jon")
THINGS = ("pens", "cards", "coins", "apples", "shells", "stamps", "books", "beads", "cups", "nuts")
BOXES = ("boxes", "bags", "packs", "jars")


@dataclass(frozen=True)
class Result:
    """An operand: the result of an earlier step."""

    step: int


@dataclass(frozen=True)
class Step:
    """One line of working, ``left op right``; ``op`` is one of ``+ - * /`` and a division leaves no remainder."""

    left: int | Result
    op: str
    right: int | Result


@dataclass(frozen=True)
class Problem:
    """``thing`` is what is counted. ``steps`` are in order and the last result is the answer."""

    kind: str
    question: str
    thing: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return solve(self.steps)[-1][3]


Line = tuple[int, str, int, int]  # left, operator, right, result


def _apply(left: int, op: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right if right else 0}[op]


def solve(steps: tuple[Step, ...], slips: Mapping[int, int] | None = None) -> list[Line]:
    """The lines of working. ``slips`` maps a step to the wrong result written there; later steps build on it."""
    lines: list[Line] = []

    def value(operand: int | Result) -> int:
        return lines[operand.step][3] if isinstance(operand, Result) else operand

    for index, step in enumerate(steps):
        left, right = value(step.left), value(step.right)
        result = (slips or {}).get(index, _apply(left, step.op, right))
        lines.append((left, step.op, right, result))
    return lines


# ---------------------------------------------------------------------------------------------- problems


def _boxes(rng: np.random.Generator, top: int) -> Problem:
    name, thing, box = rng.choice(NAMES), str(rng.choice(THINGS)), rng.choice(BOXES)
    count, each, own = rng.integers(2, 10), rng.integers(2, 10), rng.integers(2, top)
    question = f"{name} has {own} {thing} and buys {count} {box} with {each} {thing} in each. How many {thing} in all?"
    return Problem("boxes", question, thing, (Step(int(count), "*", int(each)), Step(Result(0), "+", int(own))))


def _give(rng: np.random.Generator, top: int) -> Problem:
    (name, friend), thing = rng.choice(NAMES, 2, replace=False), str(rng.choice(THINGS))
    start = rng.integers(10, 2 * top)
    gone, found = rng.integers(2, start - 2), rng.integers(2, top)
    question = (
        f"{name} has {start} {thing}, gives {gone} to {friend} and then finds {found} more. How many {thing} now?"
    )
    return Problem("give", question, thing, (Step(int(start), "-", int(gone)), Step(Result(0), "+", int(found))))


def _share(rng: np.random.Generator, top: int) -> Problem:
    name, thing = rng.choice(NAMES), str(rng.choice(THINGS))
    friends, each, own = rng.integers(2, 10), rng.integers(2, 10), rng.integers(2, top)
    question = (
        f"{name} shares {friends * each} {thing} among {friends} friends, who had {own} {thing} each before. "
        f"How many {thing} has each friend now?"
    )
    steps = (Step(int(friends * each), "/", int(friends)), Step(Result(0), "+", int(own)))
    return Problem("share", question, thing, steps)


def _times(rng: np.random.Generator, top: int) -> Problem:
    (name, friend), thing = rng.choice(NAMES, 2, replace=False), str(rng.choice(THINGS))
    own, factor = rng.integers(2, max(6, top // 3)), rng.integers(2, 6)
    question = (
        f"{name} has {own} {thing} and {friend} has {factor} times as many. How many {thing} do they have together?"
    )
    return Problem("times", question, thing, (Step(int(own), "*", int(factor)), Step(Result(0), "+", int(own))))


def _change(rng: np.random.Generator, top: int) -> Problem:
    name, thing = rng.choice(NAMES), str(rng.choice(THINGS))
    price, count = rng.integers(2, 10), rng.integers(2, 10)
    paid = price * count + rng.integers(1, top)
    question = (
        f"{name} buys {count} {thing} for {price} dollars each and pays {paid} dollars. How many dollars are left?"
    )
    return Problem("change", question, "dollars", (Step(int(count), "*", int(price)), Step(int(paid), "-", Result(0))))


PROBLEM_KINDS: dict[str, Callable[[np.random.Generator, int], Problem]] = {
    "boxes": _boxes,
    "give": _give,
    "share": _share,
    "times": _times,
    "change": _change,
}
LARGEST_NUMBER = {"easy": 10, "medium": 20, "hard": 90}  # of the numbers drawn freely, by difficulty


def _with_third_step(problem: Problem, rng: np.random.Generator, top: int) -> Problem:
    """Some are lost at the end: one step more."""
    lost = int(rng.integers(1, max(2, min(problem.answer - 1, top))))
    head, _, tail = problem.question.rpartition(". ")
    question = f"{head}. Then {lost} {problem.thing} are lost. {tail}"
    steps = (*problem.steps, Step(Result(len(problem.steps) - 1), "-", lost))
    return Problem(problem.kind, question, problem.thing, steps)


def draw_problem(rng: np.random.Generator, *, kinds: tuple[str, ...], difficulty: str) -> Problem:
    """One problem of one of ``kinds``. ``hard`` has larger numbers and, in half of the problems, a third step."""
    top = LARGEST_NUMBER[difficulty]
    problem = PROBLEM_KINDS[str(rng.choice(kinds))](rng, top)
    if difficulty == "hard" and problem.answer > 3 and rng.random() < 0.5:
        return _with_third_step(problem, rng, top)
    return problem


# ---------------------------------------------------------------------------------------------- answers

OPENERS = ("First", "Then", "Last")


def _working(problem: Problem, lines: list[Line]) -> list[str]:
    return [f"{OPENERS[i]} {a} {op} {b} = {c} {problem.thing}." for i, (a, op, b, c) in enumerate(lines)]


def clear_answer(problem: Problem) -> str:
    """Every step, in order, and the answer: what the chosen side of a pair is."""
    return " ".join([*_working(problem, solve(problem.steps)), f"{ANSWER_MARK} {problem.answer}."])


def wrong_step(problem: Problem, rng: np.random.Generator) -> str:
    """One specific step has a wrong result (off by one, by ten, or another operator) and the rest builds on it."""
    lines = solve(problem.steps)
    which = int(rng.integers(len(lines)))
    left, op, right, result = lines[which]
    other = {"+": "-", "-": "+", "*": "+", "/": "-"}[op]
    candidates = [result + d for d in (-10, -2, -1, 1, 2, 10)] + [_apply(left, other, right)]
    slip = int(rng.choice([c for c in candidates if c > 0 and c != result]))
    wrong = solve(problem.steps, {which: slip})
    if wrong[-1][3] == problem.answer or any(c < 0 for *_, c in wrong):  # not a wrong answer, or not a number we write
        wrong = solve(problem.steps, {which: result + 1})
    return " ".join([*_working(problem, wrong), f"{ANSWER_MARK} {wrong[-1][3]}."])


def cut_short(problem: Problem, rng: np.random.Generator) -> str:
    """The right working, ended before the answer is given."""
    working = _working(problem, solve(problem.steps))
    return " ".join(working[: int(rng.integers(1, len(working) + 1))])


def vague(problem: Problem, rng: np.random.Generator) -> str:
    """Words about the working, a rounded guess, no answer."""
    guess = max(10, round(problem.answer / 10) * 10)
    words = {"+": "add some", "-": "take some away", "*": "count them all", "/": "share them out"}
    plan = " and then ".join(words[step.op] for step in problem.steps)
    ending = (f"maybe about {guess} {problem.thing}", f"around {guess} or so", f"quite a few {problem.thing}")
    return f"We {plan}. It should be {ending[int(rng.integers(len(ending)))]}."


def long_winded(problem: Problem, rng: np.random.Generator) -> str:
    """Right, and three times as long as it need be."""
    opening = ("Let us think about this slowly.", "This is a good question to think about.")
    filler = ("So far so good.", f"We are counting {problem.thing} here.", "Let us go on from there.")
    parts = [opening[int(rng.integers(len(opening)))]]
    for line in _working(problem, solve(problem.steps)):
        parts += [line, filler[int(rng.integers(len(filler)))]]
    return " ".join([*parts, "After all of this we can finally say it.", f"{ANSWER_MARK} {problem.answer}."])


FLAWS: dict[str, Callable[[Problem, np.random.Generator], str]] = {
    "wrong_step": wrong_step,
    "cut_short": cut_short,
    "vague": vague,
    "long_winded": long_winded,
}
