"""--target_stderr in a run: shown in metrics, and exact over a resume."""

import json
import shutil
from pathlib import Path

from diffdpo.config import TrainConfig
from diffdpo.flags import parse_config
from diffdpo.train import train


def run(tiny_model, pairs_file, out: Path, *more: str) -> list[dict]:
    """Train in this process; the journal's step lines without what a clock or the memory says."""
    flags = [
        *("--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(out)),
        *("--max_steps", "8", "--save_steps", "2", "--learning_rate", "2e-3", "--per_device_train_batch_size", "4"),
        *("--tracking_uri", "none", "--max_length", "128", "--max_prompt_length", "64", "--max_eval_pairs", "4"),
        *("--target_stderr", "0.3", "--num_mc_samples", "12", "--beta", "0.5", "--warmup_steps", "0", *more),
    ]
    assert train(parse_config(TrainConfig, flags, "")) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "noise/num_samples", "noise/ratio_stderr")
    return [{name: line[name] for name in kept} for line in lines if "loss" in line]


def test_a_run_that_was_killed_goes_on_to_the_bit(tiny_model, pairs_file, tmp_path):
    """What kill -9 after step 5 leaves: the checkpoint of step 4 and five lines."""
    whole = run(tiny_model, pairs_file, tmp_path / "whole", "--save_total_limit", "9")
    counts = [line["noise/num_samples"] for line in whole]
    assert counts[0] == 12 and counts[1] == 6 and len(set(counts[4:])) > 1, counts
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed, ignore=shutil.ignore_patterns("final", "step-6", "summary.json"))
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (killed / "metrics.jsonl").write_text("".join(kept))
    assert json.loads((killed / "checkpoints/step-4/run.json").read_text())["step_state"]["num_samples"] == counts[4]
    assert run(tiny_model, pairs_file, killed, "--resume_from_checkpoint", "latest") == whole
