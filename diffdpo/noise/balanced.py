"""The rows of the ``balanced`` estimator, for slots 0..L-1 that the caller then assigns to tokens at random.

Three freedoms that leave the mean of a score alone, spent against its variance (derivation: docs/theory.md):

1. *Strata.* Row j draws its count k_j from the j-th of n strata of (0, L], and carries a total weight of the stratum's
   width c_j. Σ c_j = L exactly, so a constant log-probability per token is estimated without error. Rows with few
   masked tokens are the noisy ones (standard deviation ~ k^-1/2), hence narrow strata there: boundaries L (j/n)^2.
2. *Layout.* Masks of different rows may depend on each other. Slots least covered so far are masked next, so the rows
   together cover all tokens as evenly as their sizes allow.
3. *Slot weights.* A row's weight c_j may be spread unevenly over its k_j tokens, as tokens are assigned to slots at
   random. It is poured where the total over the rows so far is lowest, until all slots' totals are level: then easy
   and hard tokens count alike, and what differs between tokens, most of a score's variance, cancels.

Shape suffixes: N rows, S slots (= L).
"""

import numpy as np

STRATA_POWER = 2.0


def balanced_rows(length: int, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [N, S] bool, slot weights [N, S] (row j sums to c_j; 0 outside the mask), and widths c_N (Σ = length)."""
    bound = length * (np.arange(num_rows + 1) / num_rows) ** STRATA_POWER
    width_N = np.diff(bound)
    k_N = np.minimum((bound[:-1] + rng.random(num_rows) * width_N).astype(np.int64) + 1, length)
    masked_NS = np.zeros((num_rows, length), dtype=bool)
    weight_NS = np.zeros((num_rows, length))
    total_S = np.zeros(length)
    for row in range(num_rows):  # from the smallest masks, which have the least choice, to the largest
        slots = np.argsort(total_S, kind="stable")[: k_N[row]]
        poured = pour(total_S[slots], width_N[row])
        masked_NS[row, slots] = True
        weight_NS[row, slots] = poured
        total_S[slots] += poured
    return masked_NS, weight_NS, width_N


def pour(level_K: np.ndarray, amount: float) -> np.ndarray:
    """How much each of K vessels gets when ``amount`` is poured over them; their levels ascend."""
    surface_K = (amount + np.cumsum(level_K)) / np.arange(1, len(level_K) + 1)  # if only the first 1, 2, ... take part
    surface = surface_K[np.flatnonzero(surface_K >= level_K)[-1]]
    return np.maximum(surface - level_K, 0.0)
