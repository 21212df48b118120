"""Exact match: sample an answer to each held-out problem and let a verifier compare it with the right one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from data_pipeline.batch import PairBatch
from data_pipeline.verifiers import VERIFIERS
from diffdpo.engine.world import World
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.progress import bar_of
from diffdpo.sampling.decode import sample

BLOCK_LENGTH = 16
BATCH_SIZE = 50  # prompts sampled together


@dataclass(frozen=True, order=True)
class Problem:
    """A prompt in tokens and the answer a verifier reads from the right solution of a record."""

    prompt: tuple[int, ...]
    record: int
    truth: str


def problems_of(batches: Sequence[PairBatch], tokenizer, task: str) -> list[Problem]:
    """The distinct prompts of held-out pairs whose right result is known: stated in a record's meta as ``answer``, or
    read by the verifier from the chosen answer."""
    problems = []
    for batch in batches:
        for b, record in enumerate(batch.records):
            start, stop = int(batch.prompt_lengths_B2[b, 0]), int(batch.lengths_B2[b, 0])
            ids = batch.input_ids_B2T[b, 0, :stop].tolist()
            answer = tokenizer.decode(ids[start:], skip_special_tokens=True)
            truth = VERIFIERS[task].truth(batch.meta[b].get("answer") if batch.meta else None, answer)
            if truth is not None:
                problems.append(Problem(tuple(ids[:start]), record, truth))
    return distinct(problems)


def distinct(problems: Sequence[Problem]) -> list[Problem]:
    """One problem a prompt, in the order of the prompts; where records disagree on the truth, the first one's."""
    found: dict[tuple[int, ...], Problem] = {}
    for problem in sorted(problems):
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def answer_length(batches: Sequence[PairBatch]) -> int:
    """A length for sampled answers: the longest of the pairs', rounded up to whole blocks."""
    longest = max(int((batch.lengths_B2 - batch.prompt_lengths_B2).max()) for batch in batches)
    return BLOCK_LENGTH * -(-longest // BLOCK_LENGTH)


def exact_match(
    model: nn.Module,
    spec: FamilySpec,
    tokenizer,
    problems: Sequence[Problem],
    task: str,
    *,
    world: World,
    shared_forwards: bool,
    gen_length: int,
    temperature: float,
    seed: int,
    title: str,
) -> tuple[np.ndarray, list[str]]:
    """(1 or 0 for each problem, the sampled texts).

    The noise of a problem depends on the seed and the problem's number alone. Problems are dealt over the ranks, except
    with ``shared_forwards``: where weights are sharded every forward takes all ranks, so all do the same ones.
    """
    mine = list(range(len(problems))) if shared_forwards else list(range(world.rank, len(problems), world.size))
    texts: dict[int, str] = {}
    with bar_of(len(mine), title, unit="problem", shown=world.is_main) as bar:
        for start in range(0, len(mine), BATCH_SIZE):
            part = mine[start : start + BATCH_SIZE]
            answers = sample(
                model,
                spec,
                [problems[i].prompt for i in part],
                gen_length=gen_length,
                steps=gen_length,
                block_length=spec.block_size or BLOCK_LENGTH,
                temperature=temperature,
                seed=[seed * 1_000_003 + i for i in part],
            )
            texts.update(zip(part, (tokenizer.decode(ids, skip_special_tokens=True) for ids in answers), strict=True))
            bar.update(len(part))
    everyone: dict[int, str] = {}
    for part in world.all_gather_object(texts):
        everyone.update(part)
    ordered = [everyone[i] for i in range(len(problems))]
    right = [VERIFIERS[task].read(text) == problem.truth for text, problem in zip(ordered, problems, strict=True)]
    return np.array(right, dtype=np.float64), ordered
