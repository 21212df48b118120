"""The rows of the ``balanced`` estimator, for slots 0..L-1 that the caller then assigns to tokens at random.

Four freedoms that leave the mean of a score alone, spent against its variance (derivation: docs/theory.md):

1. *Strata.* Row j draws its count k_j from the j-th of n strata of (0, L], and carries a total weight of the stratum's
   width c_j. Σ c_j = L exactly, so a constant log-probability per token is estimated without error. Rows with few
   masked tokens are the noisy ones (standard deviation ~ k^-1/2), hence narrower strata there.
2. *Antithetic counts.* One uniform number places all counts, from below in some strata and from above in the others,
   such that a linear trend of log p in k (all but) cancels: Σ ± c_j² ≈ 0. n = 2, equal widths: a mirrored pair.
3. *Layout.* Masks of different rows may depend on each other. From the largest to the smallest, each masks the slots
   that are masked least often so far: all tokens are covered, and those of small masks are seen in a large one as well.
4. *Slot weights.* A row's weight c_j may be spread unevenly over its k_j tokens, as tokens are assigned to slots at
   random: so that what differs between tokens, much of a score's variance, cancels over the rows
   (``token_weights.py``).

Shape suffixes: N rows, S slots (= L).
"""

import numpy as np

from diffdpo.noise.token_weights import token_weights


def balanced_rows(length: int, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [N, S] bool, slot weights [N, S] (row j sums to c_j; 0 outside the mask), and widths c_N (Σ = length)."""
    bound = strata(length, num_rows)
    width_N = np.diff(bound)
    place = rng.random()
    place_N = np.where(antithetic_signs(width_N**2) > 0, place, 1 - place)
    k_N = np.minimum((bound[:-1] + place_N * width_N).astype(np.int64) + 1, length)
    masked_NS = layout(k_N, length)
    return masked_NS, token_weights(masked_NS, width_N), width_N


def strata(length: int, num_rows: int) -> np.ndarray:
    """Boundaries L (j/n)^p, j = 0..n, with p = 1 + log2(L) / 16 as measured (docs/LOG.md, 2026-11-26, fifth round): the
    longer an answer, the more of the variance comes from masks that ask few of its tokens."""
    return length * (np.arange(num_rows + 1) / num_rows) ** (1 + np.log2(length) / 16)


def layout(k_N: np.ndarray, length: int) -> np.ndarray:
    """Masks [N, S] of k_N slots each; the largest is laid first, each on the slots masked least often so far."""
    masked_NS, times_S = np.zeros((len(k_N), length), dtype=bool), np.zeros(length, dtype=np.int64)
    for row in np.argsort(-k_N, kind="stable"):
        slots = np.argsort(times_S, kind="stable")[: k_N[row]]
        masked_NS[row, slots] = True
        times_S[slots] += 1
    return masked_NS


def antithetic_signs(size_N: np.ndarray) -> np.ndarray:
    """±1 for each size, such that Σ ± size is small: the largest first, each against the sum so far."""
    sign_N, total = np.empty(len(size_N)), 0.0
    for n in np.argsort(-size_N, kind="stable"):
        sign_N[n] = -1.0 if total > 0 else 1.0
        total += sign_N[n] * size_N[n]
    return sign_N
