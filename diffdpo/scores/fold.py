"""Token log-probabilities folded to row scores, and row scores to one score an answer.

Shape suffixes: M scored positions, R rows, A = 2B answers, B pairs, 2 sides (0 chosen, 1 rejected).
"""

from dataclasses import dataclass

import torch

from diffdpo.noise.rows import NoisyRows


@dataclass(frozen=True)
class PairScores:
    """Scores of a micro-batch, sums over tokens in nats; 0 where a side is absent.

    ``score_B2``   of the dtype of f (float32, of an fp64 model float64), differentiable.
    ``stderr_B2``  the same, detached: standard error from the spread of what an answer's rows say that were drawn
                   independently of each other. Where all were drawn together, as by ``balanced`` with less than 32,
                   their own spread, which is as a rule too large: they are coupled to cancel errors
                   (docs/theory.md, section 4). 0 for ``exact``, NaN where a single row scores all tokens.
    ``tokens_B2``  long, scored tokens.
    """

    score_B2: torch.Tensor
    stderr_B2: torch.Tensor
    tokens_B2: torch.Tensor


def row_scores(logp_M: torch.Tensor, rows: NoisyRows) -> torch.Tensor:
    """f_R = Σ over the row's scored positions of scale · log p; 0 for a row with nothing to score."""
    return _sum_by(rows.row_M, logp_M * rows.scale_M.to(logp_M.dtype), len(rows)).to(logp_M.dtype)


def fold(f_R: torch.Tensor, rows: NoisyRows) -> PairScores:
    """Score of each answer, Σ_R weight · f, with its standard error.

    Linear in ``f_R``: fold(f_policy - f_reference) gives log-ratios and, noise being shared, their (much smaller)
    standard errors.
    """
    score_A = _sum_by(rows.answer_R, f_R * rows.weight_R.to(f_R.dtype), rows.num_answers).to(f_R.dtype)
    stderr_A = _standard_error(f_R.detach(), rows).to(f_R.dtype)
    return PairScores(score_A.view(-1, 2), stderr_A.view(-1, 2), rows.tokens_A.view(-1, 2))


def _standard_error(f_R: torch.Tensor, rows: NoisyRows) -> torch.Tensor:
    """sqrt(Σ_C share_C² s_C²) over cells C; s_C² is the variance of what the blocks of a cell say of a token.

    A block says u = Σ weight f / Σ share of its rows. The textbook formula for a stratified sample (Cochran, Sampling
    Techniques, 1977, chapter 5) with units of unequal size; with one cell of rows of equal shares it is the standard
    error of a mean of independent rows.
    """
    share_R, total_R = rows.share_R.to(f_R.dtype).double(), f_R.double() * rows.weight_R.to(f_R.dtype).double()
    count = len(rows)  # as many blocks and cells at most; the others stay empty
    share_G, total_G = (_sum_by_any(rows.block_R, value_R, count) for value_R in (share_R, total_R))
    u_G = torch.where(share_G > 0, total_G / share_G.clamp(min=1e-12), 0.0)
    cell_G = torch.zeros_like(rows.cell_R).scatter(0, rows.block_R, rows.cell_R)
    answer_C = torch.zeros_like(rows.answer_R).scatter(0, rows.cell_R, rows.answer_R)
    share_C = _sum_by_any(cell_G, share_G, count)

    def mean(value_G: torch.Tensor) -> torch.Tensor:
        return _sum_by_any(cell_G, share_G * value_G, count) / share_C.clamp(min=1e-12)

    spread_C = mean((u_G - mean(u_G)[cell_G]) ** 2)
    largest_C = mean(share_G) / share_C.clamp(min=1e-12)  # Σ share² / (Σ share)²: 1/n for n equal shares
    # E[spread] = s² (1 - largest) for independent blocks of one variance; a single one says nothing of its error
    variance_C = share_C**2 * spread_C * largest_C / (1 - largest_C)
    variance_C = torch.where(largest_C < 1 - 1e-9, variance_C, torch.nan)
    return _sum_by_any(answer_C, torch.where(share_C > 0, variance_C, 0.0), rows.num_answers).sqrt()


def _sum_by_any(index_X: torch.Tensor, value_X: torch.Tensor, count: int) -> torch.Tensor:
    """``_sum_by`` for indices in any order."""
    order_X = torch.argsort(index_X, stable=True)
    return _sum_by(index_X[order_X], value_X[order_X], count)


def _sum_by(index_X: torch.Tensor, value_X: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of the values of each index (ascending), in float64 and in a fixed order on every device.

    Not ``index_add``: its order on a GPU varies, and with it whether equal models get equal scores. In float64, as a
    score's use is a difference of about one nat between sums of hundreds.
    """
    size_Y = torch.bincount(index_X, minlength=count)
    return torch.segment_reduce(value_X.double(), "sum", lengths=size_Y, unsafe=True)
