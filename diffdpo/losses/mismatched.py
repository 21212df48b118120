"""Answers set against other records' prompts: what KTO's reference point z is estimated from.

Shape suffixes: B records, 2 sides, T longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair


def mismatched(step: Sequence[Sequence[PairBatch]], *, rank: int, max_length: int | None = None) -> list[PairBatch]:
    """``rank``'s micro-batches of a global step, each prompt followed by an answer to another one (KTO, section 4.1).

    ``step`` holds the micro-batches of every rank, ``step[rank][micro]``. Its answers are put in the order of the data
    set (by record number, all chosen ones, then all rejected ones), so who meets whom follows from the records alone,
    however they were sorted and cut into steps, ranks and micro-batches. Each takes the nearest answer before it,
    cyclically, that has another prompt. Where the step holds one prompt only, nothing can be mismatched and the result
    has no answers: z is 0. Score the result under policy and reference without a gradient, for ``reference_point_of``.

    ``max_length``: longest row; a longer one is cut as ``Encoder`` cuts, the end of the prompt and the start of the
    answer staying, the prompt not below half of it.
    """
    answers = [answer for side in (0, 1) for answer in _answers(step, side)]
    cells: dict[tuple[int, int, int], TokenAnswer] = {}
    for index, own in enumerate(answers):
        if own.rank != rank:
            continue
        before = (answers[(index - back) % len(answers)] for back in range(1, len(answers)))
        other = next((answer for answer in before if not np.array_equal(answer.prompt, own.prompt)), None)
        if other is not None:
            cells[own.micro, own.slot, own.side] = _joined(own.prompt, other.ids, max_length)
    return [_batch(batch, micro, cells) for micro, batch in enumerate(step[rank])]


@dataclass(frozen=True)
class _Answer:
    """An answer and where it stands; ``ids`` without the prompt."""

    rank: int
    micro: int
    slot: int
    side: int
    record: int
    prompt: np.ndarray
    ids: np.ndarray


def _answers(step: Sequence[Sequence[PairBatch]], side: int) -> list[_Answer]:
    """The answers of one side by record number; of batches that name no numbers, as they were dealt over the ranks in
    turn (``data_pipeline.order.deal_step``)."""
    found = []
    for micro, batches in enumerate(zip(*step, strict=True)):
        for slot in range(max(len(batch.ids) for batch in batches)):
            for rank, batch in enumerate(batches):
                length, prompt = int(batch.lengths_B2[slot, side]), int(batch.prompt_lengths_B2[slot, side])
                if length:
                    row = batch.input_ids_B2T[slot, side, :length].numpy()
                    number = batch.records[slot] if batch.records else 0
                    found.append(_Answer(rank, micro, slot, side, number, row[:prompt], row[prompt:]))
    return sorted(found, key=lambda answer: answer.record)  # stable


def _joined(prompt: np.ndarray, answer: np.ndarray, max_length: int | None) -> TokenAnswer:
    if max_length is not None:
        prompt = prompt[-max(max_length // 2, max_length - len(answer)) :]
        answer = answer[: max_length - len(prompt)]
    return TokenAnswer(np.concatenate([prompt, answer]).astype(np.int32), len(prompt))


def _batch(batch: PairBatch, micro: int, cells: dict[tuple[int, int, int], TokenAnswer]) -> PairBatch:
    """As many slots as ``batch`` has; ids of their own, hence noise of their own."""
    pairs = [
        TokenPair(f"{name}/mismatched", cells.get((micro, b, 0)), cells.get((micro, b, 1))) if name else None
        for b, name in enumerate(batch.ids)
    ]
    return collate(pairs, pad_id=0, epoch=batch.epoch, step=batch.step, micro=batch.micro, last_micro=batch.last_micro)
