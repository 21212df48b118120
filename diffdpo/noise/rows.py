"""NoisyRows: the forwards of a micro-batch, one masked token row each, with the positions to score.

Rows stand answer by answer (chosen and rejected of pair 0, of pair 1, ...), n for each; scored positions stand row by
row. A side that is absent (an unpaired record, an empty slot) still has its n rows, of one token and with nothing to
score, so the number of rows depends on the configuration and never on the data: ranks stay in step. (``exact`` is the
exception: its row count is 2^L - 1.)

Shape suffixes: B pairs, 2 sides, T longest row, R rows, M scored positions of all rows, A = 2B answers (2 b + side).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_pipeline.batch import PairBatch
from diffdpo.noise.estimators import draw_plan
from diffdpo.noise.plan import NoiseKey, NoisePlan


@dataclass(frozen=True)
class NoisyRows:
    """What a model is run on and what its answers mean. All tensors on one device.

    ``input_ids_RT``  long, right padded; ``lengths_R`` long, tokens of each row.
    ``answer_R``      long, whose row it is; ascending.
    ``weight_R``      float32, weight of the row in its answer's score.
    ``share_R``       float32, tokens of the answer the row stands for (see NoisePlan); for standard errors only.
    ``row_M, position_M, target_M``  long: score token ``target`` at ``position`` of ``row``; ``row_M`` ascending.
    ``scale_M``       float32, weight of a token within its row (1 for most estimators).
    ``tokens_A``      long, scored tokens of each answer; 0 where there is none.
    ``block_R, cell_R``  long, below R: the blocks and cells of the standard error (see NoisePlan), numbered through.
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
        return NoisyRows(
            self.input_ids_RT[index_S, : int(lengths_S.max()) if len(lengths_S) else 0],
            lengths_S,
            self.answer_R[index_S],
            self.weight_R[index_S],
            self.share_R[index_S],
            row_M,
            self.position_M[place_M],
            self.target_M[place_M],
            self.scale_M[place_M],
            self.tokens_A,
            self.block_R[index_S],
            self.cell_R[index_S],
        )

    def nothing(self) -> "NoisyRows":
        """A row of one token with nothing to score, on the same device."""
        none = self.row_M[:0]
        return NoisyRows(
            torch.zeros_like(self.input_ids_RT[:1, :1]),
            torch.ones_like(self.lengths_R[:1]),
            self.answer_R[:1],
            torch.zeros_like(self.weight_R[:1]),
            torch.zeros_like(self.share_R[:1]),
            none,
            none,
            none,
            self.scale_M[:0],
            self.tokens_A,
            torch.zeros_like(self.block_R[:1]),
            torch.zeros_like(self.cell_R[:1]),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "NoisyRows":
        """The same rows on another device."""
        moved = (getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self))
        return NoisyRows(*moved)


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
) -> NoisyRows:
    """Draw every answer's plan and lay its rows out, on the CPU, where the batch must be.

    Under ``balanced`` the answers of a pair that are ``alike`` are masked by one stream of noise, as ``paired`` masks
    all: what they have in common then cancels in h. UserError for estimator settings that cannot serve.
    """
    in_common = _alike_records(batch) if estimator == "balanced" else set()

    def plan(length: int, record_id: str, side: int) -> NoisePlan:
        name = "paired" if record_id in in_common else estimator
        key = NoiseKey(seed, batch.epoch, record_id, side, draw)
        steps = num_diffusion_steps
        return draw_plan(name, length=length, num_samples=num_samples, key=key, num_diffusion_steps=steps)

    return rows_of_plans(
        batch, plan, empty_rows=1 if estimator == "exact" else num_samples, mask_token_id=mask_token_id
    )


def _alike_records(batch: PairBatch) -> set[str]:
    ids_B2T, found = batch.input_ids_B2T.numpy(), set()
    for b, record_id in enumerate(batch.ids):
        spans = zip(batch.prompt_lengths_B2[b].tolist(), batch.lengths_B2[b].tolist(), strict=True)
        if alike(*(ids_B2T[b, side, start:stop] for side, (start, stop) in enumerate(spans))):
            found.add(record_id)
    return found


def rows_of_plans(
    batch: PairBatch, plan: Callable[[int, str, int], NoisePlan], *, empty_rows: int, mask_token_id: int
) -> NoisyRows:
    """``plan(answer length, record id, side)`` gives each answer's rows; absent answers get ``empty_rows`` dummies."""
    lengths, prompts = batch.lengths_B2.tolist(), batch.prompt_lengths_B2.tolist()
    ids_B2T = batch.input_ids_B2T.numpy()
    blocks: list[_Block] = []
    for b, record_id in enumerate(batch.ids):
        for side in (0, 1):
            length, prompt = lengths[b][side], prompts[b][side]
            if length > prompt:
                blocks.append(
                    _block(ids_B2T[b, side, :length], prompt, plan(length - prompt, record_id, side), mask_token_id)
                )
            else:
                blocks.append(_dummy(empty_rows, mask_token_id))
    return _join(blocks)


@dataclass(frozen=True)
class _Block:
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


def _block(ids_T: np.ndarray, prompt: int, plan: NoisePlan, mask_token_id: int) -> _Block:
    answer_L = ids_T[prompt:]
    ids_NT = np.tile(ids_T, (len(plan), 1))
    ids_NT[:, prompt:][plan.masked_NL] = mask_token_id
    row_M, offset_M = np.nonzero(plan.scored_NL)
    scale_M = np.ones(len(row_M)) if plan.scale_NL is None else plan.scale_NL[row_M, offset_M]
    return _Block(
        ids_NT,
        len(answer_L),
        plan.weight_N,
        plan.share_N,
        row_M,
        offset_M + prompt,
        answer_L[offset_M],
        scale_M,
        np.arange(len(plan)) if plan.block_N is None else plan.block_N,
        np.zeros(len(plan), np.int64) if plan.cell_N is None else plan.cell_N,
    )


def _dummy(rows: int, mask_token_id: int) -> _Block:
    nothing, zero_N, first_N = np.empty(0, np.int64), np.zeros(rows), np.zeros(rows, np.int64)
    ids_NT = np.full((rows, 1), mask_token_id)
    return _Block(ids_NT, 0, zero_N, zero_N, nothing, nothing, nothing, np.empty(0), first_N, first_N)


def _join(blocks: list[_Block]) -> NoisyRows:
    counts = [len(block.ids_NT) for block in blocks]
    starts = np.concatenate([[0], np.cumsum(counts)])
    longest = max(block.ids_NT.shape[1] for block in blocks)
    ids_RT = np.zeros((starts[-1], longest), np.int64)
    for block, start in zip(blocks, starts[:-1], strict=True):
        ids_RT[start : start + len(block.ids_NT), : block.ids_NT.shape[1]] = block.ids_NT

    def joined(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(block, name) for block in blocks])).to(dtype)

    def numbered(name: str) -> torch.Tensor:
        shifted = [getattr(block, name) + start for block, start in zip(blocks, starts[:-1], strict=True)]
        return torch.from_numpy(np.concatenate(shifted)).long()

    return NoisyRows(
        torch.from_numpy(ids_RT),
        torch.from_numpy(np.repeat([block.ids_NT.shape[1] for block in blocks], counts)).long(),
        torch.from_numpy(np.repeat(np.arange(len(blocks)), counts)).long(),
        joined("weight_N", torch.float32),
        joined("share_N", torch.float32),
        numbered("row_M"),
        joined("position_M", torch.long),
        joined("target_M", torch.long),
        joined("scale_M", torch.float32),
        torch.tensor([block.tokens for block in blocks], dtype=torch.long),
        numbered("block_N"),
        numbered("cell_N"),
    )
