"""Exact match: an answer is sampled to each problem and a verifier judges it."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from data_pipeline.verifiers import Judge
from diffdpo.evaluation.estimate import mean_figure
from diffdpo.evaluation.tasks.base import Key, Line, Subject
from diffdpo.evaluation.tasks.problems import Problem
from diffdpo.sampling.decode import DEFAULT_BLOCK, sample


class ExactMatch:
    """``sampler``: fields of ``Decoding``; what of its lengths is not given is chosen (``with_lengths``).

    The noise of a problem follows from ``seed`` and its prompt (or from ``noise``, one seed a problem), so its answer
    is the same whatever else is asked, in whatever batch and by however many processes.
    """

    def __init__(
        self,
        name: str,
        problems: Sequence[Problem],
        verifier: Judge,
        sampler: Mapping[str, Any],
        *,
        block_size: int | None = None,
        seed: int = 0,
        noise: Sequence[tuple[int, ...]] | None = None,
        left_out: Sequence[str] = (),
    ):
        self.name, self.problems, self.verifier = name, list(problems), verifier
        self.left_out = list(left_out)
        self.seed, self.keys = seed, [Key(problem.id, problem.digest) for problem in problems]
        self.sampler = with_lengths(sampler, problems, block_size=block_size)
        self.noise = noise if noise is not None else [(seed, _of_prompt(problem)) for problem in problems]

    def identity(self) -> dict[str, Any]:
        return {"task": self.name, "seed": self.seed, "sampler": self.sampler}

    def lines(self, subject: Subject, numbers: Sequence[int]) -> list[Line]:
        asked = [self.problems[number] for number in numbers]
        answers = sample(
            subject.loaded.model,
            subject.loaded.spec,
            [problem.ids for problem in asked],
            seed=[self.noise[number] for number in numbers],
            **self.sampler,
        )
        texts = [str(subject.loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
        return [
            {
                "id": problem.id,
                "prompt": problem.prompt,
                "truth": problem.truth,
                "answer": text,
                "tokens": len(ids),
                "right": self.verifier.judge(text, problem.truth, problem.prompt),
            }
            for problem, text, ids in zip(asked, texts, answers, strict=True)
        ]

    def figures(self, lines: Sequence[Line]) -> dict[str, Any]:
        full = [float(line["tokens"] >= self.sampler["gen_length"]) for line in lines]
        return {
            "exact_match": mean_figure([line["right"] for line in lines]),
            "answer_tokens": mean_figure([line["tokens"] for line in lines]),
            "unfinished": mean_figure(full),  # answers that fill their region: it may be too short
        }

    def values(self, lines: Sequence[Line]) -> dict[str, float]:
        return {line["id"]: line["right"] for line in lines}


def with_lengths(
    sampler: Mapping[str, Any], problems: Sequence[Problem], *, block_size: int | None = None
) -> dict[str, Any]:
    """The sampler with its lengths: blocks of the family's own ``block_size``, or of 32; room for the longest right
    answer, in whole blocks; one token a step."""
    length = sampler.get("gen_length")
    block = sampler.get("block_length") or block_size or min(DEFAULT_BLOCK, length or DEFAULT_BLOCK)
    if length is None:
        longest = max((problem.answer_tokens for problem in problems), default=1)
        length = block * -(-longest // block)
    return {**sampler, "gen_length": length, "block_length": block, "steps": sampler.get("steps") or length}


def _of_prompt(problem: Problem) -> int:
    return int.from_bytes(blake2b(repr(problem.ids).encode(), digest_size=7).digest())
