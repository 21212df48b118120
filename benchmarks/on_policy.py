"""Learning from one's own answers: rounds of sample, judge, pair and train against one offline round of equal updates.

    python benchmarks/on_policy.py --out runs/on_policy --seeds 3

The bundled model on generated problems. Two ways, the same flags, held-out problems and number of updates: `rounds`
(``diffdpo iterate`` with recipes/on_policy_arithmetic.yaml, smaller) and `offline` (one run on as many pairs that the
generator wrote). Every cell is a run that goes on where it was killed; the table is of the cells that are finished.
docs/on_policy.md has the results.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from diffdpo.cli.main import main as diffdpo
from diffdpo.onpolicy import iterate

SETTINGS = {
    "make_pairs": {
        "num_samples": 5,
        "gen_length": 64,
        "temperature": 1.0,
        "threshold": 0.9,
        "batch_size": 150,
        "verifier": "arithmetic",
        "pairing": "right_wrong",
        "max_pairs": 3,
    },
    "train": {"learning_rate": 3e-4, "warmup_steps": 3, "max_eval_pairs": 256, "save_steps": 20, "eval_steps": 0},
}


def main() -> None:
    """Run what is not there, seed by seed, and print the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/on_policy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100, help="a round")
    parser.add_argument("--problems", type=int, default=200, help="held out, answered before and after every round")
    args = parser.parse_args()
    out = Path(args.out)
    for seed in range(args.seeds):
        steps = run_rounds(out, seed, args)
        run_offline(out, seed, sum(steps), args)
        print(table(out), flush=True)


def run_rounds(out: Path, seed: int, args: argparse.Namespace) -> list[int]:
    """Updates of each round."""
    folder = out / f"rounds-{seed}"
    recipe = out / "recipe.yaml"
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "rounds": args.rounds,
        "prompts_per_round": args.prompts,
        "tracking_uri": "none",
        **SETTINGS,
        "train": SETTINGS["train"] | {"num_eval_problems": args.problems},
    }
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))
    iterate.run_stage = run_here
    call(["iterate", str(recipe), "--output_dir", str(folder), "--seed", str(seed)])
    return [found["steps"] for found in json.loads((folder / "summary.json").read_text())]


def run_offline(out: Path, seed: int, steps: int, args: argparse.Namespace) -> None:
    """One run of as many updates on pairs that the generator wrote, each met once."""
    folder = out / f"offline-{seed}"
    flags = SETTINGS["train"] | {"num_eval_problems": args.problems, "max_steps": steps, "seed": seed}
    flags |= {"num_generated_pairs": 8 * steps + 64, "resume_from_checkpoint": "auto", "tracking_uri": "none"}
    flags["output_dir"] = str(folder)
    call(["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])


def call(argv: Sequence[str]) -> None:
    """A command of diffdpo in this process: imports would be a third of the time. A failure ends the benchmark."""
    if diffdpo(list(argv)):
        raise RuntimeError(f"{argv[0]} did not finish")


def run_here(name: str, argv: Sequence[str], *, launcher: str | None) -> None:
    """A stage of a round, as ``call``."""
    call(argv)


def table(out: Path) -> str:
    """Held-out exact match: mean over seeds, with the standard error of that mean where there are several."""
    columns: dict[str, list[float]] = {}
    for folder in sorted(out.glob("rounds-*/summary.json")):
        for found in json.loads(folder.read_text()):
            measured = found["held_out"]["exact_match"]
            if found["round"] == 1:
                columns.setdefault("start", []).append(measured["before"]["mean"])
            columns.setdefault(f"round {found['round']}", []).append(measured["after"]["mean"])
    for folder in sorted(out.glob("offline-*/summary.json")):
        measured = json.loads(folder.read_text())["held_out"]["exact_match"]
        columns.setdefault("offline, as many updates", []).append(measured["after"]["mean"])
    lines = ["| after | seeds | exact match |", "|---|---|---|"]
    for name, values in columns.items():
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
        error = "" if math.isnan(spread) else f" ± {spread / math.sqrt(len(values)):.1%}"
        lines.append(f"| {name} | {len(values)} | {mean:.1%}{error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
