"""Diagnostics of preference training. docs/losses.md says in a line each what they mean.

They are kept as named sums, which add up over micro-batches, steps and ranks, and become means and a correlation only
at log time: ``pair_sums`` → add → ``means``.

Shape suffixes: B pairs, 2 sides (0 chosen, 1 rejected).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffdpo.scores.rounding import preferred, size_of


def pair_sums(
    policy_B2: Tensor,
    reference_B2: Tensor | None,
    *,
    tokens_B2: Tensor,
    weight_B2: Tensor,
    beta: float,
    stderr_B2: Tensor | None = None,
    ratio_stderr_B2: Tensor | None = None,
) -> dict[str, float]:
    """The sums of one micro-batch by name, in float64; the same names in the same order for every micro-batch.

    ``stderr_B2`` is the standard error of the policy's score, ``ratio_stderr_B2`` that of the log-ratio (both as
    ``fold`` gives them). NaN entries (a single row) are left out of the means. Without a reference what compares with
    one (``scores/displacement``, ``kl/...``) is left out, and rewards are β S.
    """
    compared = reference_B2 is not None
    reference_B2 = torch.zeros_like(policy_B2) if reference_B2 is None else reference_B2
    policy_B2, reference_B2 = policy_B2.detach().double(), reference_B2.detach().double()
    present_B2, pair_B = weight_B2.double(), weight_B2.double().prod(1)
    ratio_B2, tokens_B2 = policy_B2 - reference_B2, tokens_B2.double()
    reward_B2 = beta * ratio_B2

    def side(value_B2: Tensor, index: int) -> Tensor:
        return (present_B2 * value_B2)[:, index].sum()

    def all_of(value_B2: Tensor) -> Tensor:
        return (present_B2 * value_B2).sum()

    margin_B = reward_B2[:, 0] - reward_B2[:, 1]
    sums = {
        "answers": present_B2.sum(),
        "chosen": present_B2[:, 0].sum(),
        "rejected": present_B2[:, 1].sum(),
        "pairs": pair_B.sum(),
        "compared": compared * present_B2.sum(),
        "compared_chosen": compared * present_B2[:, 0].sum(),
        "compared_rejected": compared * present_B2[:, 1].sum(),
        "reward_chosen": side(reward_B2, 0),
        "reward_rejected": side(reward_B2, 1),
        "margin": (pair_B * margin_B).sum(),
        "correct": (pair_B * preferred(margin_B / beta, size_of(policy_B2, tokens_B2))).sum(),
        "policy_chosen": side(policy_B2, 0),
        "policy_rejected": side(policy_B2, 1),
        "reference_chosen": side(reference_B2, 0),
        "reference_rejected": side(reference_B2, 1),
        "ratio": all_of(ratio_B2),
        "ratio_per_token": all_of(ratio_B2 / tokens_B2.clamp(min=1)),
        "displaced": side(torch.where(ratio_B2.isnan(), torch.nan, (ratio_B2 < 0).double()), 0),
        **_known_squares(stderr_B2, present_B2, "score_variance", "known_variances"),
        **_known_squares(ratio_stderr_B2, present_B2, "ratio_variance", "known_ratio_variances"),
        "length": all_of(tokens_B2),
        "length_squared": all_of(tokens_B2**2),
        "reward": all_of(reward_B2),
        "reward_squared": all_of(reward_B2**2),
        "length_reward": all_of(tokens_B2 * reward_B2),
    }
    # one transfer from the device, not one a sum
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def means(total: Mapping[str, float]) -> dict[str, float]:
    """The diagnostics from (added, reduced) sums. A mean over nothing is left out."""
    quotients = {
        "rewards/chosen": ("reward_chosen", "chosen"),
        "rewards/rejected": ("reward_rejected", "rejected"),
        "rewards/margins": ("margin", "pairs"),
        "rewards/accuracies": ("correct", "pairs"),
        "scores/chosen": ("policy_chosen", "chosen"),
        "scores/rejected": ("policy_rejected", "rejected"),
        "scores/reference_chosen": ("reference_chosen", "compared_chosen"),
        "scores/reference_rejected": ("reference_rejected", "compared_rejected"),
        "scores/displacement": ("displaced", "compared_chosen"),
        "kl/answers": ("ratio", "compared"),
        "kl/per_token": ("ratio_per_token", "compared"),
        "noise/score_variance": ("score_variance", "known_variances"),
        "noise/ratio_variance": ("ratio_variance", "known_ratio_variances"),
    }
    found = {name: total[a] / total[b] for name, (a, b) in quotients.items() if total[b] > 0}
    for name in ("score", "ratio"):
        if f"noise/{name}_variance" in found:
            found[f"noise/{name}_stderr"] = math.sqrt(found[f"noise/{name}_variance"])
    correlation = _correlation(total)
    return found if correlation is None else found | {"rewards/length_correlation": correlation}


def _known_squares(stderr_B2: Tensor | None, present_B2: Tensor, sum_name: str, count_name: str) -> dict[str, Tensor]:
    """Sum of the squares that are known, and how many they are."""
    if stderr_B2 is None:
        return {sum_name: present_B2.new_zeros(()), count_name: present_B2.new_zeros(())}
    known_B2 = present_B2 * ~stderr_B2.isnan()
    squares_B2 = stderr_B2.detach().double().nan_to_num() ** 2
    return {sum_name: (known_B2 * squares_B2).sum(), count_name: known_B2.sum()}


def _correlation(total: Mapping[str, float]) -> float | None:
    """Pearson's, between an answer's length and its reward; None where one of them does not vary."""
    n = total["answers"]
    if n < 2:
        return None
    covariance = total["length_reward"] / n - total["length"] * total["reward"] / n**2
    variance_length = total["length_squared"] / n - (total["length"] / n) ** 2
    variance_reward = total["reward_squared"] / n - (total["reward"] / n) ** 2
    if variance_length <= 1e-12 * total["length_squared"] / n or variance_reward <= 1e-12 * total["reward_squared"] / n:
        return None
    return covariance / math.sqrt(variance_length * variance_reward)
