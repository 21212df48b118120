"""`--max_memory`: what a run does with what it has measured."""

import json
from pathlib import Path

from launch.train import main

FLAGS = ["--tracking_uri", "none", "--num_generated_pairs", "32", "--num_eval_problems", "0", "--eval_task", "none"]
FLAGS += ["--max_eval_pairs", "16", "--num_mc_samples", "2", "--max_length", "128", "--max_prompt_length", "64"]


def run(out: Path, *more: str) -> list[dict]:
    """The lines of metrics.jsonl."""
    assert main([*FLAGS, "--output_dir", str(out), *more]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_held_out_margins_are_0_before_training_on_scores_made_before(tmp_path):
    flags = ["--reference", "precomputed", "--max_memory", "0.001", "--max_steps", "1", "--seed", "6"]
    before = next(line for line in run(tmp_path / "run", *flags) if "eval/rewards/margins" in line)
    assert before["eval/rewards/accuracies"] == 0.5 and before["eval/rewards/margins"] == 0.0
