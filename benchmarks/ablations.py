"""The ablations of Diffusion-DPO as one command: what each choice buys in accuracy, memory and time, with error bars.

    python benchmarks/ablations.py --quick            # a few minutes a cell of the bundled model, one seed
    python benchmarks/ablations.py --full             # three seeds, all cells
    python benchmarks/ablations.py --full --only estimator,beta

A cell is one run of a public command; its result is kept in OUT/cells, and what is there is not run again, so the
command goes on wherever it was killed, and --full adds to --quick. A cell that fails is told of and left out, and the
command ends with exit code 1. What was run with other settings is refused, not mixed. The table and a picture a
question are made of the cells that are there: OUT/ablations.md.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.arithmetic import FLAWS
from data_pipeline.files import write_whole
from data_pipeline.generate import generate_pairs, write_jsonl
from diffdpo.children import die_with_parent
from diffdpo.evaluation.samples import read_samples

METRICS = {
    "exact_match": "exact match",
    "rewards/accuracies": "preference accuracy",
    "scores/accuracies": "chosen likelier",
}
CURVES = {
    "rewards/margins": "reward margin",
    "scores/chosen": "score of the chosen answer, nats",
    "scores/displacement": "chosen answers less likely than at the start",
    "rewards/length_correlation": "correlation of reward and length",
}
"""What to look at when a margin rises and answers get worse."""
COMMON = {"per_device_train_batch_size": 8, "max_length": 128, "max_prompt_length": 64, "warmup_steps": 5}
COMMON |= {
    "learning_rate": 3e-4,
    "tracking_uri": "none",
    "eval_steps": 0,
    "num_mc_samples": 4,
    "score_estimator": "balanced",
    "loss_type": "sigmoid",
    "beta": 0.1,
    "eval_task": "arithmetic",
}


@dataclass(frozen=True)
class Cell:
    """One setting of one question. ``flaws``: of the pairs it is trained on; none: all four kinds."""

    question: str
    name: str
    flags: dict[str, Any]
    command: str = "train"
    flaws: tuple[str, ...] = ()
    in_quick: bool = True
    looks: bool = False  # at held-out answers on the way too, a few times

    def same_run(self, other: "Cell") -> bool:
        """Whether both settings come to one run: the middle of a range stands in several questions."""
        one, two = ({**COMMON, **cell.flags, "flaws": set(cell.flaws or FLAWS)} for cell in (self, other))
        return one == two and self.command == other.command and self.looks == other.looks


def cells() -> Iterator[Cell]:
    """All of them, question by question."""
    for beta in (0.02, 0.1, 0.5, 2.0):
        yield Cell("beta", f"{beta:g}", {"beta": beta}, in_quick=beta in (0.1, 0.5))
    for n in (1, 2, 4, 8):
        yield Cell("n", f"balanced, {n}", {"num_mc_samples": n}, in_quick=n in (1, 4))
    for estimator in ("mask_count_mirror", "paired"):
        for n in (1, 2, 4, 8):
            yield Cell("n", f"{estimator}, {n}", {"score_estimator": estimator, "num_mc_samples": n}, in_quick=False)
    for steps in (2, 4, 8):
        flags = {"score_estimator": "trajectory", "num_diffusion_steps": steps, "num_mc_samples": steps}
        yield Cell("T", f"trajectory, T = {steps}", flags, in_quick=steps == 4)
    for estimator in ("uniform_t", "stratified_t", "mask_count", "mask_count_mirror", "balanced", "paired"):
        flags = {"score_estimator": estimator}
        yield Cell("estimator", estimator, flags, in_quick=estimator in ("uniform_t", "balanced"))
    for n in (1, 8):
        flags = {"score_estimator": "uniform_t", "num_mc_samples": n}
        yield Cell("estimator", f"uniform_t, n = {n}", flags, in_quick=False)
    for flaw in FLAWS:
        yield Cell("pairs", flaw, {}, flaws=(flaw,), in_quick=flaw == "wrong_step")
    yield Cell("pairs", "all four", {})
    for strategy in ("none", "checkpoint", "two_pass", "deferred"):
        flags = {"segmentation": strategy, "segment_rows": 8, "num_mc_samples": 8}
        yield Cell("memory", strategy, flags, in_quick=strategy in ("none", "two_pass"))
    for loss, flags in {
        "sigmoid": {"loss_type": "sigmoid"},
        "sigmoid + sft": {"loss_type": "sigmoid", "sft_weight": 1.0},
        "sft alone": {"loss_type": "sft"},
        "simpo": {"loss_type": "simpo", "beta": 2.0},
        "ipo": {"loss_type": "ipo"},
    }.items():
        yield Cell("objective", loss, flags, in_quick=loss != "ipo", looks=True)
    yield Cell("weights", "all", {})
    yield Cell("weights", "LoRA, rank 16", {"use_peft": True, "learning_rate": 3e-3})


def main() -> None:
    """Run the cells that are not there, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="one seed, the cells that differ most")
    size.add_argument("--full", action="store_true", help="all cells")
    parser.add_argument("--out", default="runs/ablations")
    parser.add_argument("--only", help="questions, with commas between them; default: all")
    parser.add_argument("--seeds", type=int, help="default: 1 with --quick, 3 with --full")
    parser.add_argument("--steps", type=int, help="updates of a run; default: 40 with --quick, 200 with --full")
    parser.add_argument("--problems", type=int, default=200, help="held out, answered before and after")
    args = parser.parse_args()
    asked = args.only.split(",") if args.only else sorted({cell.question for cell in cells()})
    if unknown := set(asked) - {cell.question for cell in cells()}:
        parser.error(f"--only {', '.join(sorted(unknown))}: the questions are {', '.join(question_names())}")
    for flag in ("seeds", "steps", "problems"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} is {getattr(args, flag)}; it must be 1 or more")
    steps, seeds = args.steps or (40 if args.quick else 200), args.seeds or (1 if args.quick else 3)
    out = Path(args.out)
    wanted = [cell for cell in cells() if cell.question in asked and (args.full or cell.in_quick)]
    if odd := mixed(out, steps, args.problems):
        parser.error(f"--out {out}: {odd}; give another folder")
    failed = []
    for seed in range(seeds):
        for cell in wanted:
            if not run(cell, seed, steps, args.problems, out):
                failed.append(f"{cell.question} {cell.name}, seed {seed}")
            write_whole(out / "ablations.md", report(out).encode())
    draw(out)
    print(report(out))
    if failed:
        sys.exit(f"{len(failed)} cells failed and are left out: {'; '.join(failed)}")


def flags_of(cell: Cell, seed: int, steps: int, problems: int) -> dict[str, Any]:
    """What decides a cell's result."""
    looks: dict[str, Any] = {}
    if cell.looks:  # a metric of sampled answers that could end the run has them sampled; it never does
        looks = {"eval_steps": max(1, steps // 4), "metric_for_best_model": "exact_match"}
        looks |= {"early_stopping_patience": 1000}
    return {**COMMON, **cell.flags, **looks, "seed": seed, "max_steps": steps, "num_eval_problems": problems}


def mixed(out: Path, steps: int, problems: int) -> str:
    """What of a folder's results was run otherwise than this command would, in words; '' where nothing was."""
    known = {(cell.question, cell.name): cell for cell in cells()}
    for one in results(out):
        cell = known.get((one["question"], one["name"]))
        if cell is None:
            return f"it holds a cell {one['question']} {one['name']}, which there is not"
        now = json.loads(json.dumps(flags_of(cell, one["seed"], one["steps"], problems)))
        if one["steps"] == steps and one.get("flags") != now:
            was = one.get("flags") or {}
            names = sorted(key for key in now.keys() | was.keys() if now.get(key) != was.get(key))
            return f"cell {one['question']} {one['name']} was run with other settings ({', '.join(names)})"
    return ""


def question_names() -> list[str]:
    """In their order."""
    return list(dict.fromkeys(cell.question for cell in cells()))


def run(cell: Cell, seed: int, steps: int, problems: int, out: Path) -> bool:
    """Whether there is a result: of one run, unless it was there, under this name or an equal cell's. The run's folder
    goes when it is."""
    result = result_of(cell, seed, steps, out)
    if result.exists():
        return True
    for twin in filter(cell.same_run, cells()):
        if (found := result_of(twin, seed, steps, out)).exists():
            keep(result, json.loads(found.read_text()) | {"question": cell.question, "name": cell.name})
            return True
    name, folder = result.stem, out / "runs" / result.stem
    decisive = flags_of(cell, seed, steps, problems)
    flags = decisive | {
        "output_dir": str(folder),
        "resume_from_checkpoint": "auto",
        "save_steps": 50,
        "save_total_limit": 1,
    }
    flags |= {"train_data": str(pairs_of(cell, seed, steps, out)), "eval_data": str(held_out(out))}
    flags["model_name_or_path"] = str(bundled())
    argv = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, "-m", "diffdpo", cell.command, *argv], preexec_fn=die_with_parent)
    if done.returncode:
        print(f"cell {name} ended with exit code {done.returncode} and is left out", file=sys.stderr)
        return False
    summary = json.loads((folder / "summary.json").read_text())
    kept = {"question": cell.question, "name": cell.name, "seed": seed, "steps": steps, "summary": summary}
    kept |= {"flags": decisive, "curves": curves_of(folder), "lengths": lengths_of(folder)}
    keep(result, kept)
    shutil.rmtree(folder)
    return True


def result_of(cell: Cell, seed: int, steps: int, out: Path) -> Path:
    """The file of a cell's result."""
    name = f"{cell.question}-{cell.name}-{steps}-{seed}".replace(" ", "_").replace(",", "").replace("=", "")
    return out / "cells" / f"{name}.json"


def keep(result: Path, kept: dict[str, Any]) -> None:
    """Write a result whole, its folder made."""
    result.parent.mkdir(parents=True, exist_ok=True)
    write_whole(result, (json.dumps(kept, indent=1) + "\n").encode())


def curves_of(folder: Path) -> dict[str, list[float]]:
    """What CURVES say at every step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if line.get(name) is not None] for name in CURVES}


def lengths_of(folder: Path) -> dict[int, float]:
    """Mean characters of answers to held-out problems, by the step they were sampled at."""
    found: dict[int, list[int]] = {}
    for line in read_samples(folder):
        found.setdefault(line["step"], []).append(len(line["sampled"]))
    return {step: sum(sizes) / len(sizes) for step, sizes in found.items()}


def pairs_of(cell: Cell, seed: int, steps: int, out: Path) -> Path:
    """Generated pairs, each met about once; the same ones for all cells of a seed, but for the kind of flaw."""
    flaws = cell.flaws or tuple(FLAWS)
    path = out / "data" / f"{'-'.join(flaws)}-{seed}-{steps}.jsonl"
    if not path.exists():
        write_jsonl(generate_pairs(9 * steps, seed=seed, flaws=flaws), path)
    return path


def held_out(out: Path) -> Path:
    """Pairs of all four kinds on problems that no training pair has."""
    path = out / "data" / "held_out.jsonl"
    if not path.exists():
        write_jsonl(generate_pairs(512, seed=0, split="eval"), path)
    return path


def bundled() -> Path:
    """The model that every cell starts from."""
    import diffdpo

    return Path(diffdpo.__file__).parent / "pretrained" / "arithmetic"


def results(out: Path) -> list[dict[str, Any]]:
    """What the finished cells came to."""
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]


def rows_of(found: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Seeds of one setting together, in the order of the questions."""
    order = [(cell.question, cell.name) for cell in cells()]
    together: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for one in sorted(found, key=lambda one: (order.index((one["question"], one["name"])), one["steps"])):
        together.setdefault((one["question"], one["name"], one["steps"]), []).append(one)
    return together


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error (nan for one seed)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def after(one: dict[str, Any], metric: str) -> float | None:
    """A held-out metric after training."""
    measured = one["summary"]["held_out"].get(metric)
    return measured["after"]["mean"] if measured else None


def report(out: Path) -> str:
    """A table a question: means over seeds with their standard errors, pairs a second and memory."""
    lines = ["# Ablations", "", "`python benchmarks/ablations.py`; means over seeds ± their standard error."]
    question = ""
    for (asked, name, steps), ones in rows_of(results(out)).items():
        if asked != question:
            question = asked
            lines += [
                "",
                f"## {question}",
                "",
                f"| | updates | seeds | {' | '.join(METRICS.values())} | pairs/s | GiB |",
            ]
            lines += ["|---" * (5 + len(METRICS)) + "|"]
        values = [[v for one in ones if (v := after(one, metric)) is not None] for metric in METRICS]
        texts = [_percent(*mean_and_error(column)) if column else "-" for column in values]
        speed = mean_and_error([one["summary"]["pairs_per_second"] for one in ones])[0]
        memory = mean_and_error([one["summary"]["peak_memory_gib"] for one in ones])[0]
        lines.append(f"| {name} | {steps} | {len(ones)} | {' | '.join(texts)} | {speed:.1f} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def _percent(mean: float, error: float) -> str:
    return f"{mean:.1%}" if math.isnan(error) else f"{mean:.1%} ± {error:.1%}"


def draw(out: Path) -> None:
    """A picture a question: exact match of each setting, with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw_curves(out, plt)
    for question in question_names():
        rows = {key: ones for key, ones in rows_of(results(out)).items() if key[0] == question}
        points = {
            f"{name} ({steps})": mean_and_error([v for one in ones if (v := after(one, "exact_match")) is not None])
            for (_, name, steps), ones in rows.items()
            if any(after(one, "exact_match") is not None for one in ones)
        }
        if not points:
            continue
        figure, axes = plt.subplots(figsize=(6, 0.5 + 0.4 * len(points)))
        errors = [0.0 if math.isnan(error) else error for _, error in points.values()]
        axes.errorbar([mean for mean, _ in points.values()], list(points), xerr=errors, fmt="o", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel("exact match, held out")
        figure.savefig(out / f"{question}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def draw_curves(out: Path, plt: Any) -> None:
    """Over training, for each objective: means over seeds of what CURVES say, smoothed over 5 steps."""
    rows = {key: ones for key, ones in rows_of(results(out)).items() if key[0] == "objective"}
    if not rows:
        return
    figure, axes = plt.subplots(1, len(CURVES) + 1, figsize=(4 * len(CURVES) + 4, 3.2))
    for place, (metric, title) in zip(axes, CURVES.items(), strict=False):
        for (_, name, _), ones in rows.items():
            found = [one["curves"][metric] for one in ones if one["curves"][metric]]
            if found:
                length = min(map(len, found))
                mean = [sum(curve[i] for curve in found) / len(found) for i in range(length)]
                smooth = [sum(mean[max(0, i - 4) : i + 1]) / len(mean[max(0, i - 4) : i + 1]) for i in range(length)]
                place.plot(range(1, length + 1), smooth, label=name)
        place.set_title(title, fontsize=9)
        place.set_xlabel("step")
    for (_, name, _), ones in rows.items():
        found = [one["lengths"] for one in ones]
        points = {step: [each[step] for each in found if step in each] for step in found[0]}
        means = [mean_and_error(values) for values in points.values()]
        errors = [0.0 if math.isnan(error) else error for _, error in means]
        axes[-1].errorbar([int(step) for step in points], [m for m, _ in means], yerr=errors, capsize=2, label=name)
    axes[-1].set_title("characters of held-out answers", fontsize=9)
    axes[-1].set_xlabel("step")
    axes[0].legend(fontsize=7)
    figure.savefig(out / "displacement.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
