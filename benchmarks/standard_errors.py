"""Spread of scores over draws of noise beside the standard error that is reported, by estimator, length and n.

    python benchmarks/standard_errors.py --output docs/benchmarks/standard_errors.json
    python benchmarks/standard_errors.py --model bundled --lengths 4 8 --answers 3

Spread is the standard deviation of the score over draws, known within 1 / sqrt(2 draws); reported is the root mean
square over draws of ``scores.fold``'s standard error. Without --model, the answers are those of three hand-made models
of a token's log-probability given what is masked: any length, no network, and interactions of every order. With one,
every mask of an answer is scored once, so its length is bounded; policy and reference are those of score_variance.py.

Shape suffixes: N rows, L tokens, V vocabulary, K words, D draws, Q quantities.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.estimators import ESTIMATORS, draw_plan
from diffdpo.noise.plan import NoiseKey, NoisePlan
from diffdpo.noise.rows import rows_of_plans
from diffdpo.scores.fold import fold, row_scores

TokenModel = Callable[[np.ndarray], np.ndarray]
"""Masks [N, L] bool → log-probabilities [N, L] of the tokens, of which the masked ones are read."""

MOST_ENUMERATED = 13
SAMPLED = [name for name in ESTIMATORS if name not in ("exact", "paired")]  # paired has one side's distribution


# ------------------------------------------------------------------------------------------------ hand-made models


def words(length: int, seed: int, *, moved: float = 0.0) -> TokenModel:
    """A true joint distribution: an answer is one of six noisy words, tokens are independent given the word.

    log p(token | visible ones) is exact, by Bayes' rule. ``moved``: another model, this far from that of the same seed.
    """
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    logits_KLV = 2.0 * rng.normal(size=(6, length, 8))
    answer_L = (logits_KLV[0] + rng.gumbel(size=(length, 8))).argmax(1)
    logits_KLV = logits_KLV + moved * other.normal(size=logits_KLV.shape)
    logp_KLV = logits_KLV - np.logaddexp.reduce(logits_KLV, axis=2, keepdims=True)
    logp_KL = logp_KLV[:, np.arange(length), answer_L]

    def log_probs(masked_NL: np.ndarray) -> np.ndarray:
        seen_NK = (~masked_NL).astype(float) @ logp_KL.T
        posterior_NK = np.exp(seen_NK - np.logaddexp.reduce(seen_NK, axis=1, keepdims=True))
        return np.log(posterior_NK @ np.exp(logp_KL))

    return log_probs


def leaning(length: int, seed: int, *, moved: float = 0.0) -> TokenModel:
    """Every token leans on every other: its logit is a sum over the visible ones, of either sign."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    alone_L = rng.normal(-1.5, 1.0, length)
    lean_LL = rng.normal(0.6, 2.0, (length, length)) / np.sqrt(length)
    lean_LL += moved * other.normal(size=(length, length)) / np.sqrt(length)
    return lambda masked_NL: -np.logaddexp(0, -alone_L - (~masked_NL).astype(float) @ lean_LL.T)


def sudden(length: int, seed: int, *, moved: float = 0.0) -> TokenModel:
    """Sure of everything once a few tokens of much weight are visible: a steep trend in the share that is masked."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    need_L = rng.gamma(1.0, 1.0, length) * np.exp(moved * other.normal(size=length))
    tells_L = rng.random(length) / length
    return lambda masked_NL: -need_L * (0.05 + np.exp(-16 * ((~masked_NL).astype(float) @ tells_L)))[:, None]


HAND_MADE: dict[str, Callable[..., TokenModel]] = {"words": words, "leaning": leaning, "sudden": sudden}


def difference(first: TokenModel, second: TokenModel) -> TokenModel:
    """The log-ratio of two models."""
    return lambda masked_NL: first(masked_NL) - second(masked_NL)


def hand_made(length: int, *, answers: int) -> dict[str, list[TokenModel]]:
    """Scores and log-ratios of each hand-made model, for so many answers."""
    found: dict[str, list[TokenModel]] = {}
    for name, make in HAND_MADE.items():
        found[f"{name} score"] = [make(length, seed) for seed in range(answers)]
        pairs = [(make(length, seed, moved=0.3), make(length, seed)) for seed in range(answers)]
        found[f"{name} log-ratio"] = [difference(*pair) for pair in pairs]
    return found


# --------------------------------------------------------------------------------------------------------- measuring


def measure(
    estimator: str, length: int, num_samples: int, models: list[TokenModel], *, draws: int, seed: int = 0, **options
) -> tuple[np.ndarray, np.ndarray]:
    """(spread, reported) [Q] of the scores of one answer under each of the models, over draws of the same noise."""
    chunk = max(1, 20_000 // num_samples)
    pieces = []
    for start in range(0, draws, chunk):
        keys = [NoiseKey(seed, 0, f"{estimator}/{length}", 0, d) for d in range(start, min(start + chunk, draws))]
        plans = [draw_plan(estimator, length=length, num_samples=num_samples, key=key, **options) for key in keys]
        pieces.append(folded(plans, models))
    score_DQ, stderr_DQ = np.concatenate(pieces, axis=1)
    return score_DQ.std(0, ddof=1), np.sqrt(np.nanmean(stderr_DQ**2, axis=0))  # a draw may know nothing of its error


def folded(plans: list[NoisePlan], models: list[TokenModel]) -> np.ndarray:
    """Scores and standard errors [2, D, Q] as a run gets them: by the rows of a batch, and ``fold``."""
    answer = TokenAnswer(np.zeros(1 + plans[0].masked_NL.shape[1], dtype=np.int32), 1)
    pairs = [TokenPair(str(d), answer, None) for d in range(len(plans))]
    batch = collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    rows = rows_of_plans(batch, lambda prompt, length, record, side: plans[int(record)], empty_rows=1, mask_token_id=1)
    masked_NL, scored_NL = (np.concatenate([getattr(p, name) for p in plans]) for name in ("masked_NL", "scored_NL"))
    scores = [fold(row_scores(torch.from_numpy(model(masked_NL)[scored_NL]), rows), rows) for model in models]
    both = [(one.score_B2[:, 0].double().numpy(), one.stderr_B2[:, 0].double().numpy()) for one in scores]
    return np.array(both).transpose(1, 2, 0)


def enumerated(length: int, *, answers: int, seed: int, device: str) -> dict[str, list[TokenModel]]:
    """Scores and log-ratios of generated answers under the bundled model and it after a little DPO, mask by mask."""
    from scoring import load_models, pairs_of_length

    if length > MOST_ENUMERATED:
        raise SystemExit(f"--lengths {length}: with a model at most {MOST_ENUMERATED}, as every mask is scored")
    models = load_models(None, None, dpo_steps=60, device=device, seed=seed)
    found: dict[str, list[TokenModel]] = {"bundled score": [], "bundled log-ratio": []}
    for pair in pairs_of_length(models, length, number=answers, seed=seed):
        policy, reference = (
            table(model, pair.chosen, models.mask_token_id) for model in (models.policy, models.reference)
        )
        found["bundled score"].append(policy)
        found["bundled log-ratio"].append(difference(policy, reference))
    return found


@torch.no_grad()
def table(model: torch.nn.Module, answer: TokenAnswer, mask_token_id: int) -> TokenModel:
    """The model's log-probabilities under every mask of an answer."""
    length = len(answer.ids) - answer.prompt_length
    bit_L = 1 << np.arange(length)
    masked_CL = (np.arange(2**length)[:, None] & bit_L) > 0
    logp_CL = np.zeros(masked_CL.shape)
    for start in range(0, len(masked_CL), 512):
        masked_NL = torch.from_numpy(masked_CL[start : start + 512])
        ids_NT = torch.from_numpy(np.tile(answer.ids, (len(masked_NL), 1))).long()
        masked_NT = torch.nn.functional.pad(masked_NL, (answer.prompt_length, 0))
        row_M, place_M = torch.nonzero(masked_NT, as_tuple=True)
        lengths_N = torch.full((len(ids_NT),), ids_NT.shape[1])
        logp_M = model(ids_NT.masked_fill(masked_NT, mask_token_id), lengths_N, row_M, place_M, ids_NT[row_M, place_M])
        logp_CL[start : start + 512][masked_NL.numpy()] = logp_M.double().numpy()
    return lambda masked_NL: logp_CL[masked_NL @ bit_L]


def lines(args: argparse.Namespace) -> Iterator[dict]:
    """One line per length, estimator, n and quantity; each is over all answers."""
    for length in args.lengths:
        options = {"answers": args.answers, "seed": args.seed, "device": "cpu"}
        models = enumerated(length, **options) if args.model else hand_made(length, answers=args.answers)
        every = [model for several in models.values() for model in several]
        for estimator in args.estimators:
            for n in args.num_samples:
                started = time.perf_counter()
                draws = int(np.clip(args.rows // n, args.min_draws, args.max_draws))
                spread_Q, reported_Q = measure(estimator, length, n, every, draws=draws, seed=args.seed)
                shape = {"length": length, "estimator": estimator, "n": n, "draws": draws}
                seconds = round(time.perf_counter() - started, 1)
                for name, spread, reported in zip(
                    models, *(np.split(value_Q, len(models)) for value_Q in (spread_Q, reported_Q)), strict=True
                ):
                    ratio = reported / np.maximum(spread, 1e-12)
                    yield {
                        **shape,
                        "quantity": name,
                        "spread": float(np.sqrt(np.mean(spread**2))),
                        "reported": float(np.sqrt(np.mean(reported**2))),
                        "ratio_each": [float(value) for value in ratio],
                        "seconds": seconds,
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bundled",), help="default: the hand-made ones")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 17, 64])
    parser.add_argument("--num_samples", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 256, 1024, 4096])
    parser.add_argument("--estimators", nargs="+", default=SAMPLED)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8_000, help="rows an answer and line, within the bounds on draws")
    parser.add_argument("--min_draws", type=int, default=40)
    parser.add_argument("--max_draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = {name: value for name, value in vars(args).items() if name != "output"}
    found: list[dict] = []
    for line in lines(args):
        found.append(line)
        if args.output:  # at once: a run that is broken off keeps what it has measured
            args.output.write_text(json.dumps({"settings": command, "lines": found}, indent=1) + "\n")
        shown = " ".join(f"{value:.2f}" for value in line["ratio_each"])
        print(
            f"L={line['length']:<3d} {line['estimator']:18s} n={line['n']:<5d} {line['quantity']:18s} "
            f"spread {line['spread']:9.3g}  reported {line['reported']:9.3g}  each {shown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
