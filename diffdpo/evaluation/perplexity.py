"""The ELBO's bound on the perplexity of right answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffdpo.evaluation.estimate import figure


def perplexity_bound(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """exp(Σ -score / Σ tokens), at least the perplexity: the ELBO is below the log-likelihood, and by Jensen's
    inequality what noise the estimates have left makes the bound larger on average, never smaller.

    The standard error is that of a ratio of sums over answers (Cochran, Sampling Techniques, 1977, chapter 2), times
    the bound; that of the noise is in it, as each answer draws its own.
    """
    nats, tokens = (np.array([answer[key] for answer in answers], dtype=np.float64) for key in ("score", "tokens"))
    count, ratio = len(answers), -nats.sum() / tokens.sum()
    residual = -nats - ratio * tokens
    stderr = None
    if count > 1:
        stderr = float(np.exp(ratio) * np.sqrt((residual**2).sum() * count / (count - 1)) / tokens.sum())
    return figure(lambda index: float(np.exp(-nats[index].sum() / tokens[index].sum())), count, stderr=stderr)
