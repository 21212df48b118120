"""The rows of the ``balanced`` estimator, for slots 0..L-1 that the caller then assigns to tokens at random.

Four freedoms that leave the mean of a score alone, spent against its variance (derivation: docs/theory.md):

1. *Strata.* Row j draws its count k_j from the j-th of n strata of (0, L], and carries a total weight of the stratum's
   width c_j. Σ c_j = L exactly, so a constant log-probability per token is estimated without error. Rows with few
   masked tokens are the noisy ones (standard deviation ~ k^-1/2), hence narrower strata there.
2. *Antithetic counts.* One uniform number places all counts, from below in some strata and from above in the others,
   such that a linear trend of log p in k (all but) cancels: Σ ± c_j² ≈ 0. n = 2, equal widths: a mirrored pair.
3. *Layout.* Masks of different rows may depend on each other. From the largest to the smallest, each masks the slots
   that are masked least often so far: all tokens are covered, and those of small masks are seen in a large one as well.
   Of those masked equally often, the ones that were masked together least often: so a mask is not met twice before
   the others of its size were, and what tokens owe to each other is averaged as well.
4. *Slot weights.* A row's weight c_j may be spread unevenly over its k_j tokens, as tokens are assigned to slots at
   random: so that what differs between tokens, much of a score's variance, cancels over the rows
   (``token_weights.py``).

Rows that share one assignment of tokens to slots share its luck, and how many they are does not help against that. So
many rows are drawn as blocks, each by itself (``blocks``): their mean has a variance that falls as 1/n, and what they
differ in says what it is.

Shape suffixes: N rows, S slots (= L).
"""

import numpy as np

from diffdpo.noise.token_weights import token_weights

BLOCK = 16
"""Rows of a block, at least. A larger one has less variance for its rows, but two blocks are the fewest whose spread
tells the error (docs/LOG.md, 2026-11-28)."""
PLAIN = 4
"""Up to so many rows ties are broken by the slots' order: who meets whom makes no difference there, and the default
number of rows is the one whose noise earlier runs and stored scores depend on."""
PICKS = 8
"""Slots of a mask are chosen in so many portions at most: one by one is no better and takes long for long answers."""


def blocks(num_rows: int) -> np.ndarray:
    """Rows of each block: one block for less than 2 * BLOCK rows, else as many as BLOCK allows, as equal as can be."""
    count = max(1, num_rows // BLOCK)
    return np.diff(np.arange(count + 1) * num_rows // count)


def balanced_rows(length: int, num_rows: int, place: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [N, S] bool, slot weights [N, S] (row j sums to c_j; 0 outside the mask), and widths c_N (Σ = length).

    ``place`` is uniform on [0, 1): all that is random here.
    """
    bound = strata(length, num_rows)
    width_N = np.diff(bound)
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
        if len(k_N) <= PLAIN:
            masked_NS[row, np.argsort(times_S, kind="stable")[: k_N[row]]] = True
        else:
            masked_NS[row] = _least_met(masked_NS, times_S, k_N[row])
        times_S += masked_NS[row]
    return masked_NS


def _least_met(masked_NS: np.ndarray, times_S: np.ndarray, k: int) -> np.ndarray:
    """The k slots masked least often, [S] bool; among equals those that met the ones chosen before least often."""
    level = np.partition(times_S, k - 1)[k - 1]
    chosen_S, open_S = times_S < level, times_S == level
    portion = -(-(k - np.count_nonzero(chosen_S)) // PICKS)
    as_number_NS = masked_NS.astype(np.float64)  # whole numbers, exact in any order of summation
    while (left := k - np.count_nonzero(chosen_S)) > 0:
        met_S = (as_number_NS @ chosen_S) @ as_number_NS  # times a slot was masked together with each of the chosen
        met_S[chosen_S | ~open_S] = np.inf
        chosen_S[np.argsort(met_S, kind="stable")[: min(portion, left)]] = True
    return chosen_S


def antithetic_signs(size_N: np.ndarray) -> np.ndarray:
    """±1 for each size, such that Σ ± size is small: the largest first, each against the sum so far."""
    sign_N, total = np.empty(len(size_N)), 0.0
    for n in np.argsort(-size_N, kind="stable"):
        sign_N[n] = -1.0 if total > 0 else 1.0
        total += sign_N[n] * size_N[n]
    return sign_N
