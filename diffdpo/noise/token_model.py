"""A model of what tokens contribute to a score: how much each should count in each row, and what error is then left.

A score is the sum over tokens of their log-probabilities, each averaged over all sizes of mask; a few rows see each
token at a few sizes only. What a token contributes to a log-ratio of two models is taken to be

    x_i(u) = a_i + b_i u² + noise of variance NOISE u,      u: share of the answer that is masked, Cov(a_i, b_i) = TOKEN

The model only shapes the variance: weights depend on the pattern of the masks alone, and which token gets which
pattern is left to chance, so the mean of a score does not depend on it. Its constants were measured on log-ratios of
models of 1M parameters (docs/LOG.md, 2026-11-26, fifth round); those of log-probabilities (a third of the noise) give
weights that are as good within a tenth.

Shape suffixes: N rows, S slots (tokens), P patterns (sets of rows that mask a slot), 2 coefficients (a, b).
"""

import numpy as np

TOKEN = np.array([[1.0, -0.5], [-0.5, 3.2]])
"""Covariance over tokens of (a, b); only its proportion to NOISE matters."""
NOISE = 1.1
"""Variance, at u = 1, of what a token owes to which of the others are visible."""
MEAN = np.array([1.0, 1 / 3])
"""E[(1, u²)], u uniform on (0, 1): what a score asks of a token."""


def best_weights(masked_NS: np.ndarray, total_N: np.ndarray) -> np.ndarray:
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
    features_N2, noise_N = _of_rows(masked_NS)
    seen_NP = masked_NS[:, first_P] / noise_N[:, None]
    posterior_P22 = np.linalg.inv(np.linalg.inv(TOKEN) + np.einsum("np,na,nb->pab", seen_NP, features_N2, features_N2))
    gain_NP2 = np.einsum("np,na,pab->npb", seen_NP, features_N2, posterior_P22)
    # einsum, not products of matrices: the order of its sums does not depend on the number of threads
    shared_NN = np.einsum("p,npb,mp,mb->nm", count_P, gain_NP2, seen_NP, features_N2)
    prior_NP = np.einsum("npb,b->np", gain_NP2, MEAN)
    lambda_N = np.linalg.solve(np.diag(seen_NP @ count_P) - shared_NN, total_N - prior_NP @ count_P)
    taken_P2 = np.einsum("mp,mb,m->pb", seen_NP, features_N2, lambda_N)
    weight_NP = prior_NP - np.einsum("npb,pb->np", gain_NP2, taken_P2) + seen_NP * lambda_N[:, None]
    return weight_NP[:, pattern_S.ravel()]


def coupling(masked_NS: np.ndarray, weight_NS: np.ndarray) -> float:
    """Variance of the weighted sum over what the spread of its rows suggests (``scores.fold``), both under the model.

    About 1 for rows drawn independently, less where rows are laid out to cancel each other's error; 1 for a single row,
    which has no spread.
    """
    total_N = weight_NS.sum(1)
    share_N = total_N / total_N.sum()
    features_N2, noise_N = _of_rows(masked_NS)
    # a slot's token is any of the answer's, so what all tokens have in common is no error: hence the second term
    together_NN = np.einsum("ns,ms->nm", weight_NS, weight_NS) - np.outer(total_N, total_N) / masked_NS.shape[1]
    covariance_NN = together_NN * np.einsum("na,ab,mb->nm", features_N2, TOKEN, features_N2)
    covariance_NN += np.diag((weight_NS**2).sum(1) * noise_N)
    apart_NN = covariance_NN / np.outer(share_N, share_N)  # of a row's sum scaled up to the whole answer
    spread = share_N @ np.diag(apart_NN) - share_N @ apart_NN @ share_N
    largest = share_N @ share_N
    return float(covariance_NN.sum() * (1 - largest) / (spread * largest)) if largest < 1 - 1e-9 else 1.0


def _of_rows(masked_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's (1, u²) and variance of the noise."""
    u_N = masked_NS.mean(1)
    return np.stack([np.ones(len(u_N)), u_N**2], 1), NOISE * u_N
