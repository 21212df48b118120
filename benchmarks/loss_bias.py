"""What a noisy preference logit does to the loss and its gradient, and what the alternatives cost.

    python benchmarks/loss_bias.py --output docs/benchmarks/loss_bias.json

For each pair many independent draws of n rows give the scores and, by central differences along one direction v in
parameter space (that of the mean gradient of h), the derivative of h along v. From these draws:

    loss            E[-log σ(ĥ)] against -log σ(h)
    same rows       E[-σ(-ĥ) ∂ĥ/∂v] against -σ(-h) ∂h/∂v: coefficient and gradient from the same n rows
    independent     the coefficient from n other rows
    c times more    the coefficient from c n rows, the gradient's own among them, or all of them others

Errors are relative to ½ |∂h/∂v|, the gradient at h = 0 (relative to the gradient itself they have no meaning for pairs
that are already told apart). The delta-method correction of the loss adds its estimated bias -½ σ(h) σ(-h) Var ĥ.

Shape suffixes: D draws, 2 sides.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scoring import Models, drawn_rows, drawn_scores, load_models, natural_pairs, planner

from data_pipeline.encode import TokenPair
from diffdpo.scores.fold import fold
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments

STEP = 1e-3  # of the central difference, relative to the norm of the parameters' direction


def sigma(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def direction(models: Models, pair: TokenPair, plan, *, seed: int) -> list[torch.Tensor]:
    """The unit vector along the gradient of h at one large draw."""
    rows = drawn_rows(models, pair, plan, range(10**6, 10**6 + 4), seed=seed)
    models.policy.zero_grad()
    score_B2 = fold(forward_rows(models.policy, rows), rows).score_B2
    (score_B2[:, 0] - score_B2[:, 1]).mean().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in models.policy.parameters()]
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients))
    return [g / norm.float() for g in gradients]


@torch.no_grad()
def shifted_scores(models: Models, vector: list[torch.Tensor], by: float, rows) -> np.ndarray:
    """Policy scores [D, 2] with the parameters moved ``by`` along the vector."""
    for parameter, part in zip(models.policy.parameters(), vector, strict=True):
        parameter += by * part
    found = fold(score_rows(models.policy, rows, segments=Segments(rows=64)), rows).score_B2.double().cpu().numpy()
    for parameter, part in zip(models.policy.parameters(), vector, strict=True):
        parameter -= by * part
    return found


def draws_of(models: Models, pair: TokenPair, plan, draws: int, *, beta: float, seed: int) -> tuple[np.ndarray, ...]:
    """(ĥ, ∂ĥ/∂v) of every draw."""
    policy_D2, reference_D2 = drawn_scores(models, pair, plan, range(draws), seed=seed)
    vector = direction(models, pair, plan, seed=seed)
    rows = drawn_rows(models, pair, plan, range(draws), seed=seed)
    up, down = (shifted_scores(models, vector, by, rows) for by in (STEP, -STEP))
    slope_D2, ratio_D2 = (up - down) / (2 * STEP), policy_D2 - reference_D2
    return beta * (ratio_D2[:, 0] - ratio_D2[:, 1]), beta * (slope_D2[:, 0] - slope_D2[:, 1])


def averaged(h_D: np.ndarray, count: int, offset: int) -> np.ndarray:
    """Mean of ``count`` draws, from ``offset`` draws on (cyclically), for each draw."""
    return np.mean([np.roll(h_D, -(offset + i)) for i in range(count)], axis=0)


def schemes(h_D: np.ndarray) -> dict[str, np.ndarray]:
    """The coefficient's ĥ of each scheme."""
    return {
        "same rows": h_D,
        "independent": averaged(h_D, 1, 1),
        "2n, own among them": averaged(h_D, 2, 0),
        "4n, own among them": averaged(h_D, 4, 0),
        "3n others": averaged(h_D, 3, 1),
    }


def errors_of(h_D: np.ndarray, slope_D: np.ndarray) -> dict[str, tuple[float, float]]:
    """Biases (positive: away from 0) and root mean square errors of one pair, each with its standard error.

    The truth is taken at the mean over all draws, whose own noise is in the standard errors, to first order.
    """
    h, slope = h_D.mean(), slope_D.mean()
    truth, scale = -sigma(-h) * slope, -np.sign(slope) * abs(slope) / 2
    truth_D = truth + sigma(h) * sigma(-h) * slope * (h_D - h) - sigma(-h) * (slope_D - slope)
    loss, loss_D = np.logaddexp(0, -h), np.logaddexp(0, -h_D)
    straight_D = loss - sigma(-h) * (h_D - h)
    second = 0.5 * sigma(h_D) * sigma(-h_D) * h_D.var(ddof=1)
    found = {
        "sd h": (h_D.std(ddof=1), h_D.std(ddof=1) / np.sqrt(2 * len(h_D))),
        "loss bias": estimate(loss_D - straight_D),
        "loss bias, corrected": estimate(loss_D - second - straight_D),
    }
    for name, coefficient_D in schemes(h_D).items():
        gradient_D = -sigma(-coefficient_D) * slope_D
        square, error = estimate(((gradient_D - truth) / scale) ** 2)
        found[f"bias {name}"] = estimate((gradient_D - truth_D) / scale)
        found[f"rms {name}"] = np.sqrt(square), error / (2 * np.sqrt(square))
    return {name: (float(value), float(error)) for name, (value, error) in found.items()}


def estimate(value_D: np.ndarray) -> tuple[float, float]:
    """Mean and standard error."""
    return value_D.mean(), value_D.std(ddof=1) / np.sqrt(len(value_D))


def over_pairs(each: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over the pairs, and their standard errors for these pairs as ``... ±``."""
    found = {}
    for name in each[0]:
        found[name] = float(np.mean([one[name][0] for one in each]))
        found[f"{name} ±"] = float(np.sqrt(np.sum([one[name][1] ** 2 for one in each])) / len(each))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="default: the bundled model after --dpo_steps of DPO")
    parser.add_argument("--ref_model_name_or_path", help="reference; with it, the policy is taken as it is")
    parser.add_argument("--dpo_steps", type=int, default=60)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--estimators", nargs="+", default=["uniform_t", "mask_count_mirror", "balanced"])
    parser.add_argument("--num_samples", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    models = load_models(
        args.model_name_or_path,
        args.ref_model_name_or_path,
        dpo_steps=args.dpo_steps,
        device=args.device,
        seed=args.seed,
    )
    pairs = list(islice(natural_pairs(models, seed=args.seed + 99), args.pairs))
    lines = []
    for estimator in args.estimators:
        for n in args.num_samples:
            drawn = [
                draws_of(models, pair, planner(estimator, n), args.draws, beta=1.0, seed=args.seed) for pair in pairs
            ]
            for beta in args.beta:
                each = [errors_of(beta * h_D, beta * slope_D) for h_D, slope_D in drawn]
                means = over_pairs(each)
                lines.append({"estimator": estimator, "n": n, "beta": beta, **means})
                words = "  ".join(f"{name} {means[name]:.4f} ± {means[name + ' ±']:.4f}" for name in each[0])
                print(f"{estimator:18s} n={n:<2d} β={beta:<4g} {words}", flush=True)
                if args.output:
                    settings = {name: value for name, value in vars(args).items() if name != "output"}
                    args.output.write_text(json.dumps({"settings": settings, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
