"""Learning from one's own answers: rounds of sample, judge, pair and train against one round of equal updates.

    python benchmarks/on_policy.py --out runs/on_policy --seeds 3

The bundled model on generated problems. Three ways, the same flags, held-out problems and number of updates: `rounds`
(``diffdpo iterate``), `all at once` (one such round that asks as many prompts of the first model) and `offline` (one
run on as many pairs that the generator wrote, whose chosen answers are all right, and one as long as the first round).
All models are judged afterwards on the same problems by the sampler one would use (the surest tokens at once,
temperature 0). Every cell is a run that goes on where it was killed; the table is of the seeds that are finished.
docs/on_policy.md has the results.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import yaml

import diffdpo
from data_pipeline.files import write_whole
from diffdpo.cli.main import main as command
from diffdpo.onpolicy import iterate

SETTINGS = {
    "make_pairs": {
        "num_samples": 8,
        "gen_length": 64,
        "temperature": 1.0,
        "threshold": 0.9,
        "batch_size": 150,
        "verifier": "arithmetic",
        "pairing": "right_wrong",
        "max_pairs": 3,
    },
    "train": {"learning_rate": 3e-4, "warmup_steps": 5, "max_eval_pairs": 64, "save_steps": 20, "eval_steps": 0},
}
SAMPLER = {"temperature": 0.0, "threshold": 0.9, "gen_length": 64, "block_length": 16, "batch_size": 100}
OFFLINE = "offline, as many updates"
SHORT = "offline, as many updates as round 1"
AT_ONCE = "all at once, as many updates"


def main() -> None:
    """Run what is not there, seed by seed, and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/on_policy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=400, help="a round")
    parser.add_argument("--sft_weight", type=float, default=10.0, help="of all ways")
    parser.add_argument("--problems", type=int, default=1000, help="held out, answered by every model")
    args = parser.parse_args()
    out = Path(args.out)
    for seed in range(args.seeds):
        steps = run_rounds(out, f"rounds-{seed}", seed, args)
        run_rounds(out, f"at-once-{seed}", seed, args, at_once=sum(steps))
        run_offline(out, f"offline-{seed}", seed, sum(steps), args)
        run_offline(out, f"offline-short-{seed}", seed, steps[0], args)
        judge(out, seed, steps, args.problems)
        print(table(out), flush=True)


def run_rounds(out: Path, name: str, seed: int, args: argparse.Namespace, *, at_once: int = 0) -> list[int]:
    """Updates of each round. ``at_once``: all prompts in one round of so many updates."""
    folder, recipe = out / name, out / f"{name}.yaml"
    out.mkdir(parents=True, exist_ok=True)
    rounds = 1 if at_once else args.rounds
    settings = {
        "rounds": rounds,
        "prompts_per_round": args.prompts * args.rounds // rounds,
        "tracking_uri": "none",
        **SETTINGS,
        "train": flags_of(args) | ({"max_steps": at_once} if at_once else {}),
    }
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    iterate.run_stage = run_here
    call(["iterate", str(recipe), "--output_dir", str(folder), "--seed", str(seed)])
    return [found["steps"] for found in json.loads((folder / "summary.json").read_text())]


def run_offline(out: Path, name: str, seed: int, steps: int, args: argparse.Namespace) -> None:
    """One run of as many updates on pairs that the generator wrote, each met once."""
    folder = out / name
    flags = flags_of(args) | {"max_steps": steps, "seed": seed}
    flags |= {"num_generated_pairs": 8 * steps + 64, "resume_from_checkpoint": "auto", "tracking_uri": "none"}
    flags["output_dir"] = str(folder)
    call(["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])


def flags_of(args: argparse.Namespace) -> dict[str, float]:
    """Those of every training run. Answers are judged afterwards."""
    return SETTINGS["train"] | {"sft_weight": args.sft_weight, "num_eval_problems": 0}


def call(argv: Sequence[str]) -> None:
    """A command of diffdpo in this process: imports would be a third of the time. A failure ends the benchmark."""
    if command(list(argv)):
        raise RuntimeError(f"{argv[0]} did not finish")


def run_here(name: str, argv: Sequence[str], *, launcher: str | None) -> None:
    """A stage of a round, as ``call``."""
    call(argv)


def judge(out: Path, seed: int, steps: Sequence[int], problems: int) -> None:
    """Exact match of the offline models, the start and every round's, and how each differs from the offline ones."""
    result = out / f"judged-{seed}.json"
    if result.exists():
        return
    models = {
        OFFLINE: out / f"offline-{seed}" / "final",
        SHORT: out / f"offline-short-{seed}" / "final",
        AT_ONCE: out / f"at-once-{seed}" / "round-1" / "train" / "final",
        "start": Path(diffdpo.__file__).parent / "pretrained/arithmetic",
    }
    for number in range(1, len(steps) + 1):
        models[f"round {number}"] = out / f"rounds-{seed}" / f"round-{number}" / "train" / "final"
    found = diffdpo.evaluate(
        model=[str(folder) for folder in models.values()],
        task="arithmetic",
        num_generated=problems,
        tracking_uri="none",
        **SAMPLER,
    )
    exact = [one["figures"]["exact_match"]["mean"] for one in found["results"]]
    updates = [sum(steps), steps[0], sum(steps), 0, *(sum(steps[: number + 1]) for number in range(len(steps)))]
    rows = {
        name: {"exact_match": mean, "from_short": mean - exact[1], "from_offline": mean - exact[0], "updates": taken}
        for name, mean, taken in zip(models, exact, updates, strict=True)
    }
    write_whole(result, (json.dumps(rows, indent=1) + "\n").encode())


def table(out: Path) -> str:
    """Held-out exact match, and its difference from the offline run's: means over seeds with their standard errors."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("judged-*.json"))]
    lines = [
        "| after | updates | exact match, a seed | mean | less the short offline run's | less the offline run's |",
        "|---" * 6 + "|",
    ]
    for name in found[0]:
        ones = [seed[name] for seed in found]
        each = ", ".join(f"{one['exact_match']:.1%}" for one in ones)
        updates = "-".join(
            str(u) for u in sorted({min(one["updates"] for one in ones), max(one["updates"] for one in ones)})
        )
        means = [mean_and_error([one[key] for one in ones]) for key in ("exact_match", "from_short", "from_offline")]
        lines.append(f"| {name} | {updates} | {each} | {' | '.join(means)} |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.1%}"
    return f"{mean:.1%} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)):.1%}"


if __name__ == "__main__":
    main()
