"""Token log-probabilities folded to row scores, and row scores to one score an answer.

Shape suffixes: M scored positions, R rows, A = 2B answers, B pairs, 2 sides (0 chosen, 1 rejected).
"""

from dataclasses import dataclass

import torch

from diffdpo.noise.rows import NoisyRows


@dataclass(frozen=True)
class PairScores:
    """Scores of a micro-batch, sums over tokens in nats; 0 where a side is absent.

    ``score_B2``   float32, differentiable.
    ``stderr_B2``  float32, detached: standard error from the spread of an answer's rows, as if they were drawn
                   independently: as a rule too large for the estimators whose rows are coupled to cancel errors
                   (docs/theory.md, section 4). 0 for ``exact``, NaN where a single row scores all tokens.
    ``tokens_B2``  long, scored tokens.
    """

    score_B2: torch.Tensor
    stderr_B2: torch.Tensor
    tokens_B2: torch.Tensor


def row_scores(logp_M: torch.Tensor, rows: NoisyRows) -> torch.Tensor:
    """f_R = Σ over the row's scored positions of scale · log p; 0 for a row with nothing to score."""
    return _sum_by(rows.row_M, logp_M * rows.scale_M, len(rows)).float()


def fold(f_R: torch.Tensor, rows: NoisyRows) -> PairScores:
    """Score of each answer, Σ_R weight · f, with its standard error.

    Linear in ``f_R``: fold(f_policy - f_reference) gives log-ratios and, noise being shared, their (much smaller)
    standard errors.
    """
    score_A = _sum_by(rows.answer_R, f_R * rows.weight_R, rows.num_answers).float()
    stderr_A = _standard_error(f_R.detach().double(), rows).float()
    return PairScores(score_A.view(-1, 2), stderr_A.view(-1, 2), rows.tokens_A.view(-1, 2))


def _standard_error(f_R: torch.Tensor, rows: NoisyRows) -> torch.Tensor:
    """sqrt(Σ share² · s²), s² the share-weighted variance over rows of u = weight f / share, a score per token.

    With equal shares this is the standard error of a mean of independent rows.
    """

    def mean(value_R: torch.Tensor) -> torch.Tensor:
        return _sum_by(rows.answer_R, share_R * value_R, rows.num_answers) / share_A.clamp(min=1e-12)

    share_R = rows.share_R.double()
    share_A = _sum_by(rows.answer_R, share_R, rows.num_answers)
    u_R = torch.where(share_R > 0, f_R * rows.weight_R / share_R.clamp(min=1e-12), 0.0)
    spread_A = mean((u_R - mean(u_R)[rows.answer_R]) ** 2)
    largest_A = mean(share_R) / share_A.clamp(min=1e-12)  # Σ share² / (Σ share)²: 1/n for equal shares
    # E[spread] = s² (1 - largest) for independent rows of one variance; a single row says nothing of its error
    variance_A = share_A**2 * spread_A * largest_A / (1 - largest_A)
    known_A = torch.where(largest_A < 1 - 1e-9, variance_A.sqrt(), torch.nan)
    return torch.where(share_A > 0, known_A, 0.0)


def _sum_by(index_X: torch.Tensor, value_X: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of the values of each index (ascending), in float64 and in a fixed order on every device.

    Not ``index_add``: its order on a GPU varies, and with it whether equal models get equal scores. In float64, as a
    score's use is a difference of about one nat between sums of hundreds.
    """
    size_Y = torch.bincount(index_X, minlength=count)
    return torch.segment_reduce(value_X.double(), "sum", lengths=size_Y, unsafe=True)
