"""Variance of score, log-ratio, preference logit, loss and gradient, per estimator and number of forwards.

    python benchmarks/score_variance.py --output docs/benchmarks/score_variance.json --plot docs/score_variance.png

Lines that --output holds already are kept and not measured again, so a run can be extended (by lengths, estimators and
numbers of forwards) or taken up again; with other models, pairs or draws than theirs it is refused.

Rows "VRPO n_t x n_y" are the settings of VRPO's Table 2 (arXiv 2505.19223): n_t values of t with n_y Bernoulli masks
each. "unshared" is noise drawn anew for the reference. The variances are over draws of noise for fixed pairs,
geometric means over pairs; "h" is β times a difference of log-ratios, "grad" the summed variance over all parameters.
Each cell has the same number of forwards, so few samples are measured with more draws than many.

Shape suffixes: D draws, 2 sides (0 chosen, 1 rejected).
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scoring import Models, Planner, drawn_rows, drawn_scores, load_models, pairs_of_length, planner

from data_pipeline.encode import TokenPair
from diffdpo.losses.preference import preference_loss
from diffdpo.noise.estimators import EPSILON, ESTIMATORS
from diffdpo.noise.plan import NoiseKey, NoisePlan
from diffdpo.scores.fold import fold
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments

VRPO = ((1, 1), (4, 1), (8, 1), (1, 4), (2, 2))
BASELINE = ("uniform_t", 8)  # VRPO's training setting
DEFAULT = ("balanced", 4)  # ours


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    forwards: int
    plan: Planner


def vrpo(num_t: int, num_y: int) -> Planner:
    """n_t values of t, n_y masks each."""

    def plan(length: int, key: NoiseKey) -> NoisePlan:
        rng = key.generator()
        t_N = np.repeat(EPSILON + (1 - EPSILON) * rng.random(num_t), num_y)
        masked_NL = rng.random((len(t_N), length)) < t_N[:, None]
        return NoisePlan(masked_NL, masked_NL, 1 / (len(t_N) * t_N), np.full(len(t_N), length / len(t_N)))

    return Planner(plan)


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """What is measured at each length, in order."""
    pairs = [(name, n) for name in args.estimators for n in args.num_samples]
    if args.settings:
        pairs = [(name, int(n)) for name, n in (text.split(":") for text in args.settings)]
    for name, n in pairs:
        yield Setting(name, n, planner(name, n))
    if not (args.settings or args.no_vrpo):
        for num_t, num_y in VRPO:
            yield Setting(f"VRPO {num_t}x{num_y}", num_t * num_y, vrpo(num_t, num_y))


def pair_variances(
    models: Models, pair: TokenPair, setting: Setting, *, draws: int, gradient_draws: int, beta: float, seed: int
) -> dict[str, float]:
    """The variances of one pair under one setting."""
    policy_D2, reference_D2 = drawn_scores(models, pair, setting.plan, range(draws), seed=seed)
    ratio_D2 = policy_D2 - reference_D2
    apart_D2 = policy_D2 - np.roll(reference_D2, 1, axis=0)  # the reference's noise is another draw's
    found = {"score": policy_D2.var(0, ddof=1).mean(), "ratio": ratio_D2.var(0, ddof=1).mean()}
    for name, values_D2 in (("", ratio_D2), (" unshared", apart_D2)):
        h_D = beta * (values_D2[:, 0] - values_D2[:, 1])
        found["h" + name] = h_D.var(ddof=1)
        found["loss" + name] = np.logaddexp(0, -h_D).var(ddof=1)
    if gradient_draws:
        found["grad"] = gradient_variance(models, pair, setting, draws=gradient_draws, beta=beta, seed=seed + 1)
    return {name: float(value) for name, value in found.items()}


def gradient_variance(
    models: Models, pair: TokenPair, setting: Setting, *, draws: int, beta: float, seed: int
) -> float:
    """Sum over all parameters of the variance of the loss's gradient: (Σ |g|² - D |mean g|²) / (D - 1)."""
    total, squares = None, 0.0
    for draw in range(draws):
        rows = drawn_rows(models, pair, setting.plan, range(draw, draw + 1), seed=seed)
        reference = fold(score_rows(models.reference, rows, segments=Segments(rows=64)), rows)
        scores = fold(forward_rows(models.policy, rows), rows)
        tensors = {"policy_B2": scores.score_B2, "reference_B2": reference.score_B2, "tokens_B2": scores.tokens_B2}
        models.policy.zero_grad()
        preference_loss("sigmoid", **tensors, beta=beta).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in models.policy.parameters() if p.grad is not None]).double()
        total = gradient if total is None else total + gradient
        squares += float(gradient.square().sum())
    return (squares - float(total.square().sum()) / draws) / (draws - 1)


def measure(models: Models, args: argparse.Namespace, done: set[tuple]) -> Iterator[dict]:
    """One line per length and setting that is not ``done``."""
    for length in args.lengths:
        pairs = pairs_of_length(models, length, number=args.pairs, seed=args.seed, source=args.data)
        for setting in settings(args):
            if (length, setting.name, setting.forwards) in done:
                continue
            started = time.perf_counter()
            draws = max(args.min_draws, args.rows // setting.forwards)
            options = {"gradient_draws": args.gradient_draws, "beta": args.beta, "seed": args.seed}
            each = [pair_variances(models, pair, setting, draws=draws, **options) for pair in pairs]
            means = {name: geometric_mean([one[name] for one in each]) for name in each[0]}
            yield {
                "length": length,
                "estimator": setting.name,
                "n": setting.forwards,
                "draws": draws,
                "gradient_draws": args.gradient_draws,
                "pairs": len(pairs),
                **means,
                "h_each": [one["h"] for one in each],
                "seconds": round(time.perf_counter() - started, 1),
            }


FREE = ("lengths", "num_samples", "estimators", "settings", "no_vrpo", "device", "output", "plot", "plot_by_length")
"""What lines of one file may differ in: which they are, not how they were measured."""


def read_lines(path: Path | None, command: dict) -> list[dict]:
    """The lines of an earlier run of the same measurement."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    before = content["settings"]
    changed = [name for name in command if name not in FREE and before.get(name) != command[name]]
    if changed:
        words = ", ".join(f"--{name} {before.get(name)}" for name in changed)
        raise SystemExit(f"{path} was measured with {words}; use the same, or another --output")
    return content["lines"]


def geometric_mean(values: list[float]) -> float:
    """0 if one of them is: the score of a trajectory of one step is the same in every draw."""
    return float(np.exp(np.mean(np.log(values)))) if min(values) > 0 else 0.0


def relative_to_baseline(lines: list[dict]) -> list[str]:
    """For each setting the variance of h over that of the baseline, mean over lengths: 1 or less meets the figure."""
    base = {line["length"]: line for line in lines if (line["estimator"], line["n"]) == BASELINE}
    report = []
    for name, n in dict.fromkeys((line["estimator"], line["n"]) for line in lines):
        mine = [line for line in lines if (line["estimator"], line["n"]) == (name, n) and line["length"] in base]
        if mine:
            quotients = {
                q: [line[q] / base[line["length"]][q] for line in mine if q in line] for q in ("score", "h", "grad")
            }
            words = "  ".join(f"{q} {geometric_mean(v):6.3f}" for q, v in quotients.items() if v)
            report.append(f"{name:18s} n={n:<3d} {words}")
    return report


def plot(lines: list[dict], path: Path) -> None:
    """Variance of the preference logit and of the gradient against n, one curve an estimator, mean over lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [q for q in ("score", "h", "grad") if q in lines[0]]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.8), squeeze=False)
    titles = {"score": "score S", "h": "preference logit h (noise shared)", "grad": "gradient of the loss"}
    for axis, quantity in zip(axes[0], shown, strict=True):
        # a trajectory of n steps estimates another quantity for every n
        left_out = ("VRPO", "trajectory")
        for name in dict.fromkeys(line["estimator"] for line in lines if not line["estimator"].startswith(left_out)):
            mine = [line for line in lines if line["estimator"] == name]
            n = sorted({line["n"] for line in mine})
            mean = [geometric_mean([line[quantity] for line in mine if line["n"] == k]) for k in n]
            axis.loglog(n, mean, marker="o", markersize=3, label=name)
        axis.set_xlabel("forwards n")
        axis.set_title(f"variance of the {titles[quantity]}", fontsize=9)
        axis.set_xticks(n, [str(k) for k in n])
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_by_length(lines: list[dict], path: Path) -> None:
    """The default estimator at half the forwards against the baseline, by length of the answer: below 1 it wins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {(line["length"], line["estimator"], line["n"]): line for line in lines}
    name, n = DEFAULT
    lengths = sorted(L for L, *key in cells if tuple(key) == BASELINE and (L, name, n) in cells)
    figure, axis = pyplot.subplots(figsize=(5.2, 3.8))
    for quantity, title in {"score": "score S", "h": "logit h", "loss": "loss", "grad": "gradient"}.items():
        measured = [L for L in lengths if quantity in cells[L, name, n]]
        quotients = [cells[L, name, n][quantity] / cells[(L, *BASELINE)][quantity] for L in measured]
        axis.loglog(measured, quotients, marker="o", markersize=3, label=title)
    axis.axhline(1, color="black", linewidth=0.7)
    axis.set_xticks(lengths, [str(L) for L in lengths])
    axis.set_xlabel("tokens of the answer")
    axis.set_title(f"variance, {name} n = {n} over {BASELINE[0]} n = {BASELINE[1]}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def hardware(device: str) -> str:
    """Where this was measured; variances do not depend on it, seconds do."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return f"{name}, {platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="policy; default: the bundled model after --dpo_steps of DPO")
    parser.add_argument("--ref_model_name_or_path", help="reference; with it, the policy is taken as it is")
    parser.add_argument("--dpo_steps", type=int, default=60)
    parser.add_argument("--dpo_learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32, 64, 128, 256])
    parser.add_argument("--num_samples", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--estimators", nargs="+", default=[name for name in ESTIMATORS if name != "exact"])
    parser.add_argument("--settings", nargs="+", help="such as uniform_t:8 balanced:4, instead of all combinations")
    parser.add_argument("--no_vrpo", action="store_true", help="leave out the settings of VRPO's Table 2")
    parser.add_argument("--data", help="file of pairs with long answers; default: generated ones, joined if too short")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a length")
    parser.add_argument("--rows", type=int, default=400, help="forwards a side, pair, and setting")
    parser.add_argument("--min_draws", type=int, default=40)
    parser.add_argument("--gradient_draws", type=int, default=0, help="draws for the gradient's variance; 0: skip it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file: variances against the number of forwards")
    parser.add_argument("--plot_by_length", type=Path, help="PNG file: the default against the baseline by length")
    args = parser.parse_args()
    command = {name: value for name, value in vars(args).items() if name not in ("output", "plot", "plot_by_length")}
    lines = read_lines(args.output, command)
    options = {"dpo_steps": args.dpo_steps, "learning_rate": args.dpo_learning_rate}
    options |= {"device": args.device, "seed": args.seed}
    models = load_models(args.model_name_or_path, args.ref_model_name_or_path, **options)
    for line in measure(models, args, {(line["length"], line["estimator"], line["n"]) for line in lines}):
        lines.append(line)
        numbers = "  ".join(f"{k} {v:9.3g}" for k, v in line.items() if isinstance(v, float) and k != "seconds")
        print(f"L={line['length']:<4d} {line['estimator']:18s} n={line['n']:<3d} {numbers}", flush=True)
        if args.output:
            content = {"hardware": hardware(args.device), "settings": command, "lines": lines}
            args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nvariance relative to {BASELINE[0]} n={BASELINE[1]} (geometric mean over lengths)")
    print("\n".join(relative_to_baseline(lines)))
    if args.plot:
        plot(lines, args.plot)
    if args.plot_by_length:
        plot_by_length(lines, args.plot_by_length)


if __name__ == "__main__":
    main()
