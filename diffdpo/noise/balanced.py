"""The rows of the ``balanced`` estimator, for slots 0..L-1 that the caller then assigns to tokens at random.

Four freedoms that leave the mean of a score alone, spent against its variance (derivation: docs/theory.md):

1. *Strata.* Row j draws its count k_j from the j-th of n strata of (0, L], and carries a total weight of the stratum's
   width c_j. Σ c_j = L exactly, so a constant log-probability per token is estimated without error. Rows with few
   masked tokens are the noisy ones (standard deviation ~ k^-1/2), hence narrower strata there.
2. *Antithetic counts.* One uniform number places all counts, from below in some strata and from above in the others,
   such that a linear trend of log p in k (all but) cancels: Σ ± c_j² ≈ 0. With n = 2 that is the mirrored pair.
3. *Layout.* Masks of different rows may depend on each other. Slots least covered so far are masked next, so the rows
   together cover all tokens as evenly as their sizes allow.
4. *Slot weights.* A row's weight c_j may be spread unevenly over its k_j tokens, as tokens are assigned to slots at
   random. Most of it is poured where the total over the rows so far is lowest, until these are level: then easy and
   hard tokens count alike, and what differs between tokens, much of a score's variance, cancels.

Shape suffixes: N rows, S slots (= L), K masked slots of a row.
"""

import numpy as np

STRATA_POWER = 1.25  # stratum boundaries are L (j/n)^power; 1: equal widths
EVEN_SHARE = (
    0.3  # of a row's weight: spread evenly over the row, which the rows' own noise asks for; the rest is poured
)


def balanced_rows(length: int, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [N, S] bool, slot weights [N, S] (row j sums to c_j; 0 outside the mask), and widths c_N (Σ = length)."""
    bound = length * (np.arange(num_rows + 1) / num_rows) ** STRATA_POWER
    width_N = np.diff(bound)
    place = rng.random()
    place_N = np.where(antithetic_signs(width_N**2) > 0, place, 1 - place)
    k_N = np.minimum((bound[:-1] + place_N * width_N).astype(np.int64) + 1, length)
    masked_NS = np.zeros((num_rows, length), dtype=bool)
    weight_NS = np.zeros((num_rows, length))
    total_S = np.zeros(length)
    for row in range(num_rows):  # from the smallest masks, which have the least choice, to the largest
        slots = np.argsort(total_S, kind="stable")[: k_N[row]]
        poured_K = pour(total_S[slots], width_N[row])
        masked_NS[row, slots] = True
        weight_NS[row, slots] = (1 - EVEN_SHARE) * poured_K + EVEN_SHARE * width_N[row] / k_N[row]
        total_S += weight_NS[row]
    return masked_NS, weight_NS, width_N


def antithetic_signs(size_N: np.ndarray) -> np.ndarray:
    """±1 for each size, such that Σ ± size is small: the largest first, each against the sum so far."""
    sign_N, total = np.empty(len(size_N)), 0.0
    for n in np.argsort(-size_N, kind="stable"):
        sign_N[n] = -1.0 if total > 0 else 1.0
        total += sign_N[n] * size_N[n]
    return sign_N


def pour(level_K: np.ndarray, amount: float) -> np.ndarray:
    """How much each of K vessels gets when ``amount`` is poured over them; their levels ascend."""
    surface_K = (amount + np.cumsum(level_K)) / np.arange(1, len(level_K) + 1)  # if only the first 1, 2, ... take part
    surface = surface_K[np.flatnonzero(surface_K >= level_K)[-1]]
    return np.maximum(surface - level_K, 0.0)
