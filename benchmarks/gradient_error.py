"""What a gradient is worth for what it costs: fewer rows for its coefficient, pairs left out of its backward.

    python benchmarks/gradient_error.py --output docs/benchmarks/gradient_error.json

The bundled model after ever more steps of DPO, all parameters trained. Of each of some fresh pairs, which stand for all
there are, one draw of n rows an answer gives the gradient of its loss over all parameters, and each scheme another
estimate v of it. A scheme's figure is E|v|² - |E v|², the error of a mean over one pair, times its cost in F (a forward
of 4 rows of both answers; a backward of them is 2F), relative to the default way in flat memory: how many times as much
error, or time, that way takes. Between pairs gradients differ more than they agree, so E v itself is known poorly from
some hundred pairs; for schemes that change it (``coefficient``) the bias is given, in units of the error.

    default       σ(-ĥ) from the gradient's own rows: reference F, policy F, backward 2F; F more where memory is flat
    coefficient   σ(-ĥ) from m rows of their own draw, the gradient from all: flat 2m/4 + 3
    selective     a pair goes backward with probability p and is divided by it, ĥ from all rows: flat 2 + 3q
    screen        p from few rows of a pair, then all rows of those kept and σ(-ĥ) from all of them: flat 2m/4 + 5q, one
                  graph 2m/4 + 4q; p = min(1, pull / τ) for the best τ in hindsight, or as ``fixed`` has it

q is the share of the pairs that is kept. Gradients are kept as count sketches (Charikar, Chen and Farach-Colton,
Theoretical Computer Science 312, 2004), which keep inner products to a few hundredths.

Shape suffixes: P pairs, 2 sides, N rows of an answer, K numbers of a sketch.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from loss_bias import sigma
from scoring import Models, drawn_rows, load_models, natural_pairs, planner, train

from data_pipeline.encode import TokenPair
from diffdpo.scores.fold import fold
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments

SIZE = 2048  # numbers of a sketch


@dataclass(frozen=True)
class Drawn:
    """One draw of every pair: ratio_P2N of each row with its weight, and the gradient of each answer's score."""

    ratio_P2N: np.ndarray
    gradient_P2K: np.ndarray
    tokens_P2: np.ndarray

    @property
    def logit_P(self) -> np.ndarray:
        """h / β."""
        score_P2 = self.ratio_P2N.sum(-1)
        return score_P2[:, 0] - score_P2[:, 1]


class Sketch:
    """Gradients of a model's parameters → K numbers."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters, generator = parameters, torch.Generator().manual_seed(0)
        size = sum(parameter.numel() for parameter in parameters)
        self.bucket = torch.randint(SIZE, (size,), generator=generator)
        self.sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1

    def __call__(self, value: torch.Tensor) -> np.ndarray:
        gradients = torch.autograd.grad(value, self.parameters, allow_unused=True, retain_graph=True)
        both = zip(self.parameters, gradients, strict=True)
        flat = torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in both])
        return torch.zeros(SIZE).index_add_(0, self.bucket, flat * self.sign).numpy()


def draw(
    models: Models, pairs: list[TokenPair], estimator: str, n: int, *, sketch: Sketch | None = None, number: int = 0
) -> Drawn:
    """Draw ``number`` of every pair; without a sketch, scores alone."""
    ratios, gradients, tokens = [], [], []
    for pair in pairs:
        rows = drawn_rows(models, pair, planner(estimator, n), range(number, number + 1), seed=5)
        reference_R = score_rows(models.reference, rows, segments=Segments())
        with torch.set_grad_enabled(sketch is not None):
            policy_R = forward_rows(models.policy, rows)
        ratios.append(((policy_R.detach() - reference_R) * rows.weight_R).view(2, n).numpy())
        tokens.append(rows.tokens_A.numpy())
        if sketch:
            score_B2 = fold(policy_R, rows).score_B2
            gradients.append(np.stack([sketch(score_B2[0, side]) for side in (0, 1)]))
    return Drawn(np.stack(ratios), np.stack(gradients) if sketch else np.zeros((len(pairs), 2, 0)), np.stack(tokens))


@dataclass(frozen=True)
class Loss:
    """-log σ(h) with ``sft`` times the mean log-probability of the chosen answer."""

    beta: float
    sft: float

    def pull_P2(self, logit_P: np.ndarray, tokens_P2: np.ndarray) -> np.ndarray:
        """dL/dS of both sides."""
        moved_P = self.beta * sigma(-self.beta * logit_P)
        return np.stack([-moved_P - self.sft / tokens_P2[:, 0], moved_P], 1)

    def size_P(self, logit_P: np.ndarray, tokens_P2: np.ndarray) -> np.ndarray:
        """|dL/dS|."""
        return np.linalg.norm(self.pull_P2(logit_P, tokens_P2), axis=1)

    def gradient_PK(self, drawn: Drawn, logit_P: np.ndarray) -> np.ndarray:
        """Each pair's, with the coefficient at ``logit_P``."""
        return (self.pull_P2(logit_P, drawn.tokens_P2)[..., None] * drawn.gradient_P2K).sum(1)


def square_of_mean(value_PK: np.ndarray) -> float:
    """|E v|², from products of different pairs: no noise of a single one is in it."""
    total_K, count = value_PK.sum(0), len(value_PK)
    return float((total_K @ total_K - (value_PK**2).sum()) / (count * (count - 1)))


def largest_mask(drawn: Drawn) -> np.ndarray:
    """h / β from the last row of ``balanced`` alone, that of the largest mask, scaled to the answer's tokens."""
    length_P2 = drawn.tokens_P2.astype(float)
    n = drawn.ratio_P2N.shape[-1]
    share_P2 = 1 - ((n - 1) / n) ** (1 + np.log2(length_P2) / 16)  # as ``noise.balanced.strata`` has it
    score_P2 = drawn.ratio_P2N[..., -1] / share_P2
    return score_P2[:, 0] - score_P2[:, 1]


def fixed(loss: Loss, guess_P: np.ndarray, tokens_P2: np.ndarray) -> np.ndarray:
    """p = min(1, 2 · pull at half the guess / pull at 0), 0.05 at least."""
    agreed_P = loss.size_P(0 * guess_P, tokens_P2)
    return np.clip(2 * loss.size_P(guess_P / 2, tokens_P2) / agreed_P, 0.05, 1)


def schemes(loss: Loss, drawn: dict[str, Drawn]) -> dict[str, dict[str, float]]:
    """Error, cost and their product of every scheme, relative to the default in flat memory at the end."""
    main = drawn["balanced 4"]
    usual_PK = loss.gradient_PK(main, main.logit_P)
    mean = max(0.0, square_of_mean(usual_PK))
    second_P, found = (usual_PK**2).sum(1), {}

    def add(name: str, error: float, cost: float, **more: float) -> None:
        found[name] = {"error": error, "cost": cost, "product": error * cost, **more}

    def add_kept(name: str, p_P: np.ndarray, before: float, each: float) -> None:
        q = float(p_P.mean())
        add(name, float((second_P / p_P).mean()) - mean, before + each * q, kept=q)

    def add_best(name: str, size_P: np.ndarray, before: float, each: float) -> None:
        top = size_P.max() * 1.0001
        choices = [np.minimum(1, size_P / tau) for tau in np.geomspace(top, top * 1e-3, 60)]
        cost = [((second_P / p_P).mean() - mean) * (before + each * p_P.mean()) for p_P in choices]
        add_kept(name, choices[int(np.argmin(cost))], before, each)

    for name, each in drawn.items():
        if each.gradient_P2K.size:
            n = each.ratio_P2N.shape[-1]
            gradient_PK = loss.gradient_PK(each, each.logit_P)
            error = float((gradient_PK**2).sum(1).mean()) - mean
            add(f"{name}, flat", error, 5 * n / 4)
            add(f"{name}, one graph", error, n)
    for m in (1, 2):
        other = drawn[f"few {m}"].logit_P
        gradient_PK = loss.gradient_PK(main, other)
        error = float((gradient_PK**2).sum(1).mean()) - mean
        bias = square_of_mean(gradient_PK - usual_PK) / error
        add(f"coefficient from {m}, flat", error, 3 + m / 2, bias=bias)
    add_best("selective, flat, best τ", loss.size_P(main.logit_P, main.tokens_P2), 2, 3)
    guesses = {"1 own": (1, drawn["few 1"].logit_P), "2 own": (2, drawn["few 2"].logit_P)}
    guesses["largest mask"] = (1, largest_mask(main))
    for name, (m, guess_P) in guesses.items():
        for way, each in (("flat", 5), ("one graph", 4)):
            add_best(f"screen by {name}, {way}, best τ", loss.size_P(guess_P / 2, main.tokens_P2), m / 2, each)
            add_kept(f"screen by {name}, {way}, fixed", fixed(loss, guess_P, main.tokens_P2), m / 2, each)
    default = found["balanced 4, flat"]["product"]
    return {name: one | {"times": default / one["product"]} for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 40, 100, 250], help="stages: steps of DPO")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft_weight", type=float, nargs="+", default=[0.0, 0.05, 1.0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    models = load_models(None, None, dpo_steps=0, device="cpu", seed=args.seed)
    sketch = Sketch(list(models.policy.parameters()))
    pairs = list(islice(natural_pairs(models, seed=args.seed + 99), args.pairs))
    lines, done = [], 0
    for stage in args.steps:
        how = {"learning_rate": args.learning_rate, "estimator": "mask_count", "num_samples": 1}
        train(models, steps=stage - done, seed=args.seed + stage, **how)
        done = stage
        drawn = {
            f"{name} {n}": draw(models, pairs, name, n, sketch=sketch)
            for name, n in (("balanced", 4), ("balanced", 2), ("mask_count", 1), ("uniform_t", 4))
        }
        for m, name in ((1, "mask_count"), (2, "balanced")):
            drawn[f"few {m}"] = draw(models, pairs, name, m, number=m)
        logit_P = args.beta * drawn["balanced 4"].logit_P
        h = {"mean": logit_P.mean(), "wrong": (logit_P < 0).mean(), "sigma": sigma(-logit_P).mean()}
        for sft in args.sft_weight:
            found = schemes(Loss(args.beta, sft), drawn)
            lines.append({"steps": stage, "sft": sft, "h": {k: float(v) for k, v in h.items()}, "schemes": found})
            print(f"\n{stage} steps, sft {sft}: " + ", ".join(f"{k} {v:.3f}" for k, v in h.items()))
            for name, one in found.items():
                rest = "".join(f"  {key} {one[key]:.4f}" for key in ("kept", "bias") if key in one)
                print(f"  {name:40s} error {one['error']:.4g}  cost {one['cost']:.2f}F  times {one['times']:.2f}{rest}")
            if args.output:
                settings = {name: value for name, value in vars(args).items() if name != "output"}
                args.output.write_text(json.dumps({"settings": settings, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
