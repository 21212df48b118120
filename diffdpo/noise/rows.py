"""NoisyRows: the forwards of a micro-batch, one masked token row each, with the positions to score.

Rows stand answer by answer (chosen and rejected of pair 0, of pair 1, ...), n for each; scored positions stand row by
row. A side that is absent (an unpaired record, an empty slot) still has its n rows, of one token and with nothing to
score, so the number of rows depends on the configuration and never on the data: ranks stay in step. (``exact`` is the
exception: its row count is 2^L - 1.)

Of a block-causal family (docs/theory.md, section 6) a row holds its answer's blocks only, from the one that the answer
begins in; what it looks back on are the clean tokens before each block, once an answer (``CleanAnswers``).

Shape suffixes: B pairs, 2 sides, T longest row, R rows, M scored positions of all rows, A = 2B answers (2 b + side).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import PairBatch
from diffdpo.noise.block_score import block_tokens, draw_block_plan, num_block_rows
from diffdpo.noise.estimators import draw_plan
from diffdpo.noise.plan import NoiseKey, NoisePlan


@dataclass(frozen=True)
class CleanAnswers:
    """The clean tokens that rows of a block-causal family look back on. All tensors on one device.

    ``ids_AT``    long, right padded: prompt and answer.
    ``length_A``  long, how many of them are looked at: the whole blocks before the last; 0 where there is no answer.
    ``start_A``   long, position of the first token of the answer's rows, that of the block the answer begins in.
    ``shared_A``  long, leading tokens, in whole blocks, that both answers of a pair have in common; 0 for a
                  lone answer.
    """

    ids_AT: torch.Tensor
    length_A: torch.Tensor
    start_A: torch.Tensor
    shared_A: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CleanAnswers":
        """These answers on another device."""
        return CleanAnswers(
            *(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        )

    def nothing(self) -> "CleanAnswers":
        """One answer that is absent."""
        zero_A = torch.zeros_like(self.length_A[:1])
        return CleanAnswers(torch.zeros_like(self.ids_AT[:1, :1]), zero_A, zero_A, zero_A)


@dataclass(frozen=True, kw_only=True)
class NoisyRows:
    """What a model is run on and what its answers mean. All tensors on one device.

    ``input_ids_RT``  long, right padded; ``lengths_R`` long, tokens of each row.
    ``answer_R``      long, whose row it is; ascending.
    ``weight_R``      float64, weight of the row in its answer's score.
    ``share_R``       float64, tokens of the answer the row stands for (see NoisePlan); for standard errors only.
    ``row_M, position_M, target_M``  long: score token ``target`` at ``position`` of ``row``; ``row_M`` ascending.
    ``scale_M``       float64, weight of a token within its row (1 for most estimators). Weights are used in the
                      dtype of what they weigh.
    ``tokens_A``      long, scored tokens of each answer; 0 where there is none.
    ``block_R, cell_R``  long, below R: the blocks and cells of the standard error (see NoisePlan), numbered through.
    ``clean``         of a block-causal family; None where attention is full.
    """

    input_ids_RT: torch.Tensor
    lengths_R: torch.Tensor
    answer_R: torch.Tensor
    weight_R: torch.Tensor
    share_R: torch.Tensor
    row_M: torch.Tensor
    position_M: torch.Tensor
    target_M: torch.Tensor
    scale_M: torch.Tensor
    tokens_A: torch.Tensor
    block_R: torch.Tensor
    cell_R: torch.Tensor
    clean: CleanAnswers | None = None

    def __len__(self) -> int:
        return len(self.lengths_R)

    @property
    def num_answers(self) -> int:
        return len(self.tokens_A)

    def taken(self, index_S: torch.Tensor) -> "NoisyRows":
        """Rows ``index_S``, in that order, as rows of their own: padding trimmed, ``row_M`` counted from 0. Where their
        ``answer_R`` is not ascending they are to be scored, not to be folded."""
        lengths_S = self.lengths_R[index_S]
        first_S, stop_S = torch.searchsorted(self.row_M, index_S), torch.searchsorted(self.row_M, index_S + 1)
        count_S = stop_S - first_S
        row_M = torch.arange(len(index_S), device=index_S.device).repeat_interleave(count_S)
        shift_S = first_S - (count_S.cumsum(0) - count_S)
        place_M = torch.arange(len(row_M), device=row_M.device) + shift_S[row_M]
        index = {"_R": index_S, "_M": place_M}  # every field of a row, or of a scored position, goes along
        chosen = {f.name: getattr(self, f.name)[index[f.name[-2:]]] for f in fields(self) if f.name[-2:] in index}
        chosen["row_M"] = row_M
        longest = int(lengths_S.max()) if len(lengths_S) else 0
        return replace(self, **chosen, input_ids_RT=self.input_ids_RT[index_S, :longest])

    def nothing(self) -> "NoisyRows":
        """A row of one token with nothing to score, on the same device."""
        first = {f.name: torch.zeros_like(getattr(self, f.name)[:1]) for f in fields(self) if f.name.endswith("_R")}
        none = {f.name: getattr(self, f.name)[:0] for f in fields(self) if f.name.endswith("_M")}
        return replace(
            self,
            **{**first, **none, "lengths_R": torch.ones_like(self.lengths_R[:1])},
            input_ids_RT=torch.zeros_like(self.input_ids_RT[:1, :1]),
            clean=self.clean.nothing() if self.clean else None,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "NoisyRows":
        """These rows on another device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in own.items() if value is not None}
        return NoisyRows(**{name: value.to(device, non_blocking=non_blocking) for name, value in given.items()})


ALIKE = 0.5
"""Share of equal tokens from which ``balanced`` gives both answers of a pair one stream of noise. Measured
(docs/theory.md, section 3): from here on the variance of h falls, below it may rise."""


def alike(chosen_L: np.ndarray, rejected_L: np.ndarray) -> bool:
    """Whether at least half of the longer answer's tokens stand in the other at the same places."""
    shorter = min(len(chosen_L), len(rejected_L))
    equal = np.count_nonzero(chosen_L[:shorter] == rejected_L[:shorter])
    return bool(shorter and equal >= ALIKE * max(len(chosen_L), len(rejected_L)))


def noisy_rows(
    batch: PairBatch,
    *,
    estimator: str,
    num_samples: int,
    seed: int,
    mask_token_id: int,
    draw: int = 0,
    num_diffusion_steps: int | None = None,
    block_size: int | None = None,
) -> NoisyRows:
    """Draw every answer's plan and lay its rows out, on the CPU, where the batch must be.

    Under ``balanced`` the answers of a pair that are ``alike`` are masked by one stream of noise, as ``paired`` masks
    all: what they have in common then cancels in h. ``block_size``: of a block-causal family, whose blocks are counted
    from the start of the sequence. UserError for estimator settings that cannot serve.
    """
    in_common = _alike_records(batch) if estimator == "balanced" else set()

    def plan(prompt: int, length: int, record_id: str, side: int) -> NoisePlan:
        name = "paired" if record_id in in_common else estimator
        key = NoiseKey(seed, batch.epoch, record_id, side, draw)
        options: dict[str, Any] = {"num_samples": num_samples, "key": key, "num_diffusion_steps": num_diffusion_steps}
        if block_size:
            return draw_block_plan(name, tokens=block_tokens(prompt, length, block_size), **options)
        return draw_plan(name, length=length, **options)

    empty = 1 if estimator == "exact" else num_samples
    if block_size:
        empty = num_block_rows(estimator, block_size=block_size, num_samples=num_samples)
    return rows_of_plans(batch, plan, empty_rows=empty, mask_token_id=mask_token_id, block_size=block_size)


def _alike_records(batch: PairBatch) -> set[str]:
    ids_B2T, found = batch.input_ids_B2T.numpy(), set()
    for b, record_id in enumerate(batch.ids):
        spans = zip(batch.prompt_lengths_B2[b].tolist(), batch.lengths_B2[b].tolist(), strict=True)
        if alike(*(ids_B2T[b, side, start:stop] for side, (start, stop) in enumerate(spans))):
            found.add(record_id)
    return found


def rows_of_plans(
    batch: PairBatch,
    plan: Callable[[int, int, str, int], NoisePlan],
    *,
    empty_rows: int,
    mask_token_id: int,
    block_size: int | None = None,
) -> NoisyRows:
    """``plan(prompt length, answer length, record id, side)`` gives each answer's rows; absent ones get ``empty_rows``
    dummies."""
    lengths, prompts = batch.lengths_B2.tolist(), batch.prompt_lengths_B2.tolist()
    ids_B2T = batch.input_ids_B2T.numpy()
    answers: list[_Answer] = []
    for b, record_id in enumerate(batch.ids):
        for side in (0, 1):
            length, prompt = lengths[b][side], prompts[b][side]
            if length > prompt:
                drawn = plan(prompt, length - prompt, record_id, side)
                start = prompt // block_size * block_size if block_size else 0
                answers.append(_answer(ids_B2T[b, side, :length], prompt, drawn, mask_token_id, start=start))
            else:
                answers.append(_dummy(empty_rows, mask_token_id))
    return _join(answers, clean=_clean(batch, block_size) if block_size else None)


def _clean(batch: PairBatch, block_size: int) -> CleanAnswers:
    """What the rows of the batch's answers look back on."""
    ids_B2T, lengths_B2, prompts_B2 = (
        t.numpy() for t in (batch.input_ids_B2T, batch.lengths_B2, batch.prompt_lengths_B2)
    )
    there_B2 = lengths_B2 > prompts_B2
    length_B2 = np.where(there_B2, (lengths_B2 - 1) // block_size * block_size, 0)
    start_B2 = np.where(there_B2, prompts_B2 // block_size * block_size, 0)
    alike_BT = np.cumprod(ids_B2T[:, 0] == ids_B2T[:, 1], axis=1)
    shared_B = np.minimum(alike_BT.sum(1), length_B2.min(1)) // block_size * block_size
    return CleanAnswers(
        batch.input_ids_B2T.flatten(0, 1),
        *(torch.from_numpy(value).long() for value in (length_B2.ravel(), start_B2.ravel(), shared_B.repeat(2))),
    )


@dataclass(frozen=True)
class _Answer:
    """Rows of one answer, in numpy."""

    ids_NT: np.ndarray
    tokens: int
    weight_N: np.ndarray
    share_N: np.ndarray
    row_M: np.ndarray
    position_M: np.ndarray
    target_M: np.ndarray
    scale_M: np.ndarray
    block_N: np.ndarray
    cell_N: np.ndarray


def _answer(ids_T: np.ndarray, prompt: int, plan: NoisePlan, mask_token_id: int, *, start: int) -> _Answer:
    """Rows that begin at token ``start`` of the sequence."""
    answer_L = ids_T[prompt:]
    ids_NT = np.tile(ids_T[start:], (len(plan), 1))
    ids_NT[:, prompt - start :][plan.masked_NL] = mask_token_id
    row_M, offset_M = np.nonzero(plan.scored_NL)
    return _Answer(
        ids_NT=ids_NT,
        tokens=len(answer_L),
        weight_N=plan.weight_N,
        share_N=plan.share_N,
        row_M=row_M,
        position_M=offset_M + prompt - start,
        target_M=answer_L[offset_M],
        scale_M=np.ones(len(row_M)) if plan.scale_NL is None else plan.scale_NL[row_M, offset_M],
        block_N=np.arange(len(plan)) if plan.block_N is None else plan.block_N,
        cell_N=np.zeros(len(plan), np.int64) if plan.cell_N is None else plan.cell_N,
    )


def _dummy(rows: int, mask_token_id: int) -> _Answer:
    nothing, zero_N, first_N = np.empty(0, np.int64), np.zeros(rows), np.zeros(rows, np.int64)
    return _Answer(
        ids_NT=np.full((rows, 1), mask_token_id),
        tokens=0,
        weight_N=zero_N,
        share_N=zero_N,
        row_M=nothing,
        position_M=nothing,
        target_M=nothing,
        scale_M=np.empty(0),
        block_N=first_N,
        cell_N=first_N,
    )


def _join(answers: list[_Answer], *, clean: CleanAnswers | None) -> NoisyRows:
    counts = [len(answer.ids_NT) for answer in answers]
    starts = np.concatenate([[0], np.cumsum(counts)])
    longest = max(answer.ids_NT.shape[1] for answer in answers)
    ids_RT = np.zeros((starts[-1], longest), np.int64)
    for answer, start in zip(answers, starts[:-1], strict=True):
        ids_RT[start : start + len(answer.ids_NT), : answer.ids_NT.shape[1]] = answer.ids_NT

    def joined(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(answer, name) for answer in answers])).to(dtype)

    def numbered(name: str) -> torch.Tensor:
        shifted = [getattr(answer, name) + start for answer, start in zip(answers, starts[:-1], strict=True)]
        return torch.from_numpy(np.concatenate(shifted)).long()

    return NoisyRows(
        input_ids_RT=torch.from_numpy(ids_RT),
        lengths_R=torch.from_numpy(np.repeat([answer.ids_NT.shape[1] for answer in answers], counts)).long(),
        answer_R=torch.from_numpy(np.repeat(np.arange(len(answers)), counts)).long(),
        weight_R=joined("weight_N", torch.float64),
        share_R=joined("share_N", torch.float64),
        row_M=numbered("row_M"),
        position_M=joined("position_M", torch.long),
        target_M=joined("target_M", torch.long),
        scale_M=joined("scale_M", torch.float64),
        tokens_A=torch.tensor([answer.tokens for answer in answers], dtype=torch.long),
        block_R=numbered("block_N"),
        cell_R=numbered("cell_N"),
        clean=clean,
    )
