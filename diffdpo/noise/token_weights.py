"""How much each masked token of each row should count, so that what the rows estimate has the least variance.

A score is the sum over tokens of their log-probabilities, each averaged over all sizes of mask; a few rows see each
token at a few sizes only. What a token contributes (a log-probability, or a log-ratio of two models) is taken to be

    x_i(u) = a_i + b_i u² + noise of variance NOISE u,      u: share of the answer that is masked, Cov(a_i, b_i) = TOKEN

The model only shapes the variance: weights depend on the pattern of the masks alone, and which token gets which
pattern is left to chance, so the mean of a score does not depend on it. Its constants lie between those measured for
log-probabilities and for log-ratios of models of 1M parameters (docs/LOG.md, 2026-11-26, fifth round); those of either
give weights that are as good within a tenth.

Shape suffixes: N rows, S slots (tokens), P patterns (sets of rows that mask a slot), 2 coefficients (a, b).
"""

import numpy as np

TOKEN = np.array([[1.0, -0.4], [-0.4, 1.75]])
"""Covariance over tokens of (a, b); only its proportion to NOISE matters."""
NOISE = 0.6
"""Variance, at u = 1, of what a token owes to which of the others are visible."""
MEAN = np.array([1.0, 1 / 3])
"""E[(1, u²)], u uniform on (0, 1): what a score asks of a token."""


def token_weights(masked_NS: np.ndarray, total_N: np.ndarray) -> np.ndarray:
    """Weights [N, S] of least variance, 0 outside the masks; row n, which masks at least one token, has ``total_N[n]``.

    The best linear unbiased predictor of Σ_i E_u[x_i] (Henderson, Biometrics 31, 1975; Robinson, Statistical Science 6,
    1991). With V_s = (TOKEN⁻¹ + Σ_{n masks s} f_n f_nᵀ / d_n)⁻¹, f = (1, u²), d = NOISE u, slot s in row n has

        f_nᵀ V_s (MEAN - Σ_{m masks s} f_m λ_m / d_m) / d_n + λ_n / d_n

    where λ, the multipliers of the rows' totals, solves N linear equations. Weights may be negative: a token that
    counts much in a row of few masked tokens, as it stands for the many that are not asked there, is subtracted where
    it is seen again.
    """
    _, first_P, pattern_S, count_P = np.unique(
        np.packbits(masked_NS, axis=0), axis=1, return_index=True, return_inverse=True, return_counts=True
    )  # slots masked by the same rows get the same weights
    u_N = masked_NS.mean(1)
    features_N2 = np.stack([np.ones_like(u_N), u_N**2], 1)
    seen_NP = masked_NS[:, first_P] / (NOISE * u_N)[:, None]
    seen_NP2 = seen_NP[:, :, None] * features_N2[:, None, :]
    posterior_P22 = np.linalg.inv(np.linalg.inv(TOKEN) + np.einsum("npa,nb->pab", seen_NP2, features_N2))
    gain_NP2 = np.einsum("npa,pab->npb", seen_NP2, posterior_P22)
    # einsum and sum, not products of matrices, whose sums depend on the number of threads. The last digits still depend
    # on the machine (solve); weights are used in 32 bits.
    rows, patterns = seen_NP.shape
    counted_NQ = (gain_NP2 * count_P[:, None]).reshape(rows, 2 * patterns)
    shared_NN = np.einsum("nq,mq->nm", counted_NQ, seen_NP2.reshape(rows, 2 * patterns))
    prior_NP = np.einsum("npb,b->np", gain_NP2, MEAN)
    lambda_N = np.linalg.solve(np.diag((seen_NP * count_P).sum(1)) - shared_NN, total_N - (prior_NP * count_P).sum(1))
    taken_P2 = np.einsum("npb,n->pb", seen_NP2, lambda_N)
    weight_NP = prior_NP - np.einsum("npb,pb->np", gain_NP2, taken_P2) + seen_NP * lambda_N[:, None]
    return weight_NP[:, pattern_S.ravel()]
