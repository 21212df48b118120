"""The estimators of the diffusion score: each a way to draw N (mask, weight) rows for an answer of L tokens.

With m the masked positions and f(m) the summed log-probability of the masked tokens, the score is the any-order ELBO

    B = E_{t~U(0,1)} E_{m~Bern(t)} [f(m) / t] = E_{k~U{1..L}} E_{|m|=k} [(L/k) f(m)]

or, for ``trajectory``, its T-step version B^(T). docs/theory.md derives both and each estimator's unbiasedness.
Every function takes (length, num_samples, rng) and returns a NoisePlan.

Shape suffixes: N rows, L tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from diffdpo.errors import UserError
from diffdpo.noise.balanced import PLAIN, balanced_rows, blocks
from diffdpo.noise.plan import NoiseKey, NoisePlan

EPSILON = 1e-3  # smallest t of the estimators that weigh by 1/t: their variance would be infinite at 0 (LLaDA, VRPO)
MAX_EXACT_LENGTH = 12  # 4095 masks
SAMPLER_ORDER = "sampler_order"  # no noise: the model itself finds the order (``scores.sampler_order``)
AUTO = "auto"  # resolved by what the model is (``block_score.resolved``) before anything is drawn


def draw_plan(
    estimator: str, *, length: int, num_samples: int, key: NoiseKey, num_diffusion_steps: int | None = None
) -> NoisePlan:
    """The rows of one answer of ``length`` ≥ 1 scored tokens.

    ``num_samples`` rows, except for ``exact``, which has 2^length - 1. ``num_diffusion_steps`` is T of ``trajectory``
    (default: ``num_samples``). Raises UserError for an unknown estimator or one that cannot serve.
    """
    check_estimator(estimator, num_samples=num_samples, num_diffusion_steps=num_diffusion_steps)
    if length < 1:
        raise ValueError(f"an answer of {length} tokens has nothing to score")
    return drawn(estimator, length, num_samples, generator_of(estimator, key), num_diffusion_steps)


def generator_of(estimator: str, key: NoiseKey) -> np.random.Generator:
    """The stream of an answer's noise: ``paired`` has one for both sides."""
    return (replace(key, side=0) if estimator == "paired" else key).generator()


def drawn(
    estimator: str, length: int, num_samples: int, rng: np.random.Generator, num_diffusion_steps: int | None
) -> NoisePlan:
    """The rows of ``length`` tokens, drawn from ``rng``; settings unchecked."""
    if estimator == "trajectory":
        return trajectory(length, num_samples, rng, num_diffusion_steps or num_samples)
    return ESTIMATORS[estimator](length, num_samples, rng)


def check_estimator(
    estimator: str, *, num_samples: int, num_diffusion_steps: int | None = None, trains: bool = True
) -> None:
    """UserError if these settings contradict; needs no data, so commands call it before a model is loaded.

    ``trains``: whether a gradient is taken; without one the sampler's order is allowed too.
    """
    allowed = (AUTO, *ESTIMATORS) if trains else (AUTO, *ESTIMATORS, SAMPLER_ORDER)
    if estimator == SAMPLER_ORDER and trains:
        raise UserError(
            f"--score_estimator {SAMPLER_ORDER} takes a forward for every token, each after the last: it is for score, "
            "evaluate and lm-eval; train with balanced, or auto"
        )
    if estimator not in allowed:
        raise UserError(f"--score_estimator {estimator}: unknown; choose one of {', '.join(allowed)}")
    if num_samples < 1:
        raise UserError(f"--num_mc_samples is {num_samples}; it must be at least 1")
    if num_diffusion_steps is not None and estimator != "trajectory":
        raise UserError(f"--num_diffusion_steps belongs to --score_estimator trajectory, not to {estimator}")
    if num_diffusion_steps is not None and num_diffusion_steps < 1:
        raise UserError(f"--num_diffusion_steps is {num_diffusion_steps}; it must be at least 1")


def num_rows(estimator: str, *, length: int, num_samples: int) -> int:
    """Rows (forwards) that ``draw_plan`` gives an answer."""
    return 2**length - 1 if estimator == "exact" else num_samples


def uniform_t(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """t ~ U(ε, 1), Bernoulli(t) masks, weight 1/(n t): LLaDA's and VRPO's (arXiv 2505.19223, n_t = n, n_y = 1).

    Masks may be empty and then contribute 0. Leaving out t < ε = 1e-3 costs a bias of about ε times the difference
    between B and its integrand at t = 0.
    """
    return _bernoulli(length, EPSILON + (1 - EPSILON) * rng.random(num_samples), rng)


def stratified_t(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """``uniform_t`` with t on a lattice of n points under one random shift (Kingma et al., VDM, appendix I.1)."""
    lattice_N = (rng.random() + np.arange(num_samples) / num_samples) % 1.0
    plan = _bernoulli(length, EPSILON + (1 - EPSILON) * lattice_N, rng)
    return replace(plan, cell_N=_neighbours(lattice_N))


def mask_count(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """k ~ U{1..L}, exactly k tokens masked, weight L/(n k): never empty, and no 1/t tail."""
    return _counted(rng.integers(1, length + 1, num_samples), _ranks(num_samples, length, rng))


def mask_count_mirror(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """Pairs of rows (k, order) and (L+1-k, reversed order); k stratified over the pairs.

    Between them the rows of a pair mask every token, and k and L+1-k are both uniform on 1..L over the strata.
    With odd n the last row is a ``mask_count`` row of its own.
    """
    pairs, single = divmod(num_samples, 2)
    lower_P = (np.arange(pairs) + rng.random(pairs)) / (2 * max(1, pairs))  # in (0, 1/2); the mirror is in (1/2, 1)
    k_P = (lower_P * length).astype(np.int64) + 1
    ranks_PL = _ranks(pairs, length, rng)
    k_N = np.stack([k_P, length + 1 - k_P], 1).reshape(-1)
    block_N = np.arange(num_samples) // 2
    ranks_NL = np.stack([ranks_PL, length - 1 - ranks_PL], 1).reshape(-1, length)
    if single:
        k_N = np.append(k_N, rng.integers(1, length + 1))
        ranks_NL = np.concatenate([ranks_NL, _ranks(1, length, rng)])
    plan = _counted(k_N, ranks_NL)
    if num_samples < 3:
        return plan
    return replace(plan, block_N=block_N, cell_N=_neighbours(np.arange(pairs + single))[block_N])


def balanced(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """Stratified, antithetic counts, and masks and token weights laid out so that every token counts about once in all.

    ``balanced.py`` has the construction. Unbiased for B like ``mask_count``. The rows of a pair whose answers are
    mostly the same are drawn as ``paired`` draws them (``noise.rows.alike``).
    """
    size_G = blocks(num_samples)
    if len(size_G) == 1:
        plan = _block(length, num_samples, rng)
        # a single block says nothing of its error; what is known of it is the spread of its rows, less their trend in k
        return replace(plan, cell_N=_neighbours(np.arange(num_samples))) if num_samples > PLAIN else plan
    # streams of their own: what a block draws must not depend on how many tokens the one before it had (``paired``)
    keys = rng.integers(0, 2**64, (len(size_G), 2), dtype=np.uint64)
    streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    plans = [_block(length, size, stream) for size, stream in zip(size_G, streams, strict=True)]
    weight_N = np.repeat(size_G / num_samples, size_G)
    masked_NL = np.concatenate([plan.masked_NL for plan in plans])
    share_N = weight_N * np.concatenate([plan.share_N for plan in plans])
    scale_NL = np.concatenate([plan.scale_NL for plan in plans])
    return NoisePlan(masked_NL, masked_NL, weight_N, share_N, scale_NL, np.repeat(np.arange(len(size_G)), size_G))


def _block(length: int, num_rows: int, rng: np.random.Generator) -> NoisePlan:
    """Balanced rows that share one assignment of tokens to slots."""
    masked_NS, scale_NS, width_N = balanced_rows(length, num_rows, rng.random())
    slot_L = np.argsort(np.argsort(rng.random(length)))  # a uniform permutation, growing with L token by token
    masked_NL = masked_NS[:, slot_L]
    return NoisePlan(masked_NL, masked_NL, np.ones(num_rows), width_N, scale_NS[:, slot_L])


def paired(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """``balanced`` with one stream of noise for both sides of a pair (``draw_plan`` leaves the side out of the key).

    Each side's score has the distribution it has under ``balanced``. But the i-th tokens of both sides draw the same
    number, so where the answers agree they are masked alike, and what they have in common cancels in h.
    """
    return balanced(length, num_samples, rng)


def quadrature(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """t on the n Gauss-Legendre nodes of (0, 1) with weights ω, one random mask each (after GDPO, arXiv 2510.08554).

    At a node, k = 1 + Binomial(L-1, t) masked tokens with weight ω L/k have the mean of Bernoulli(t) masks with weight
    ω/t (size-biased counts), without empty masks. Exact if the integrand is a polynomial in t of degree < 2n, hence
    whenever L ≤ 2n; else it has a bias, which falls as O(1/n^4) for a smooth integrand.
    """
    node_N, omega_N = _gauss_nodes(num_samples)
    k_N = 1 + rng.binomial(length - 1, node_N)
    plan = _counted(k_N, _ranks(num_samples, length, rng))
    return replace(plan, weight_N=omega_N * length / k_N, share_N=omega_N * length, cell_N=_neighbours(node_N))


def trajectory(length: int, num_samples: int, rng: np.random.Generator, num_steps: int) -> NoisePlan:
    """The source concept: reveal token i at step τ_i ~ U{1..T}; row t masks {τ_i ≤ t} and scores {τ_i = t}.

    n = T visits a whole trajectory; n < T visits a uniform subset of its steps, each with weight T/n; n > T goes on
    with further trajectories. Unbiased for B^(T).
    """
    tau_NL, step_N = np.empty((num_samples, length), np.int64), np.empty(num_samples, np.int64)
    for start in range(0, num_samples, num_steps):
        stop = min(start + num_steps, num_samples)
        tau_NL[start:stop] = rng.integers(1, num_steps + 1, length)
        step_N[start:stop] = 1 + rng.permutation(num_steps)[: stop - start]
    masked_NL, scored_NL = tau_NL <= step_N[:, None], tau_NL == step_N[:, None]
    weight_N, share_N = np.full(num_samples, num_steps / num_samples), np.full(num_samples, length / num_samples)
    if num_samples % num_steps == 0:  # every token once a trajectory: how many a step has of them is then no error
        share_N = weight_N * scored_NL.sum(1)
    if num_samples >= 2 * num_steps:
        return NoisePlan(masked_NL, scored_NL, weight_N, share_N, block_N=np.arange(num_samples) // num_steps)
    cell_N, scoring_N = np.zeros(num_samples, np.int64), share_N > 0
    cell_N[scoring_N] = _neighbours(step_N[scoring_N])
    return NoisePlan(masked_NL, scored_NL, weight_N, share_N, cell_N=cell_N)


def exact(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """All 2^L - 1 masks, weight 1/(k C(L, k)): B itself. The empty mask has nothing to say and is left out."""
    if length > MAX_EXACT_LENGTH:
        raise UserError(
            f"--score_estimator exact enumerates every mask, for answers of at most {MAX_EXACT_LENGTH} tokens; "
            f"this one has {length} (use balanced with a large --num_mc_samples)"
        )
    codes_N = np.arange(1, 2**length)
    masked_NL = (codes_N[:, None] >> np.arange(length)) & 1 == 1
    k_N = masked_NL.sum(1)
    count_K = np.bincount(k_N, minlength=length + 1)  # C(L, k)
    return NoisePlan(masked_NL, masked_NL, 1.0 / (k_N * count_K[k_N]), np.zeros(len(k_N)))


@cache
def _gauss_nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights of (0, 1)."""
    node_N, omega_N = np.polynomial.legendre.leggauss(count)
    return (node_N + 1) / 2, omega_N / 2


def _bernoulli(length: int, t_N: np.ndarray, rng: np.random.Generator) -> NoisePlan:
    masked_NL = rng.random((len(t_N), length)) < t_N[:, None]
    return NoisePlan(masked_NL, masked_NL, 1.0 / (len(t_N) * t_N), np.full(len(t_N), length / len(t_N)))


def _counted(k_N: np.ndarray, ranks_NL: np.ndarray) -> NoisePlan:
    """Row n masks the k_n tokens of lowest rank; weight L/(n k)."""
    num_samples, length = ranks_NL.shape
    masked_NL = ranks_NL < k_N[:, None]
    share_N = np.full(num_samples, length / num_samples)
    return NoisePlan(masked_NL, masked_NL, share_N / k_N, share_N)


def _neighbours(place_X: np.ndarray) -> np.ndarray:
    """Cells of two neighbours, one of three if need be: small enough that a trend along ``place_X`` is no chance."""
    count = len(place_X)
    rank_X = np.argsort(np.argsort(place_X, kind="stable"))
    return rank_X * max(1, count // 2) // max(1, count)


def _ranks(rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Independent uniform permutations of 0..L-1, one a row."""
    return rng.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)


ESTIMATORS: dict[str, Callable[..., NoisePlan]] = {
    "trajectory": trajectory,
    "uniform_t": uniform_t,
    "stratified_t": stratified_t,
    "mask_count": mask_count,
    "mask_count_mirror": mask_count_mirror,
    "balanced": balanced,
    "paired": paired,
    "quadrature": quadrature,
    "exact": exact,
}
