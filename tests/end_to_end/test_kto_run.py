"""--loss_type kto from the command line: single answers with labels, and pairs."""

import json
import sys

import pytest

from data_pipeline.generate import generate_pairs

TRAIN = [sys.executable, "launch/train.py", "--engine", "plain", "--loss_type", "kto", "--tracking_uri", "none"]


@pytest.fixture(scope="module")
def unpaired_file(tmp_path_factory):
    """Half right answers, half flawed ones, to different questions."""
    path, lines = tmp_path_factory.mktemp("unpaired") / "answers.jsonl", []
    for i, record in enumerate(generate_pairs(48, seed=1)):
        side = "rejected" if i % 2 else "chosen"
        lines.append({"prompt": record["prompt"], "completion": record[side], "label": side == "chosen"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", ["unpaired_file", pytest.param("pairs_file", marks=pytest.mark.slow)])
def test_kto_trains_and_is_judged_on_held_out_answers(command, request, tiny_model, tmp_path, kind):
    data, out = request.getfixturevalue(kind), tmp_path / "run"
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(data), "--output_dir", str(out)]
    flags += ["--max_steps", "4", "--learning_rate", "5e-3", "--warmup_steps", "0", "--num_mc_samples", "2"]
    flags += ["--max_length", "128", "--max_prompt_length", "64", "--eval_fraction", "0.3", "--eval_steps", "2"]
    done = command([*TRAIN, *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    # policy = reference: every reward and z are 0; the mean over answers is 1 - σ(0)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6) and steps[-1]["loss"] < 0.5
    assert all(line["kl/reference_point"] >= 0 for line in steps)
    held_out = json.loads((out / "summary.json").read_text())["held_out"]
    assert held_out["loss"]["before"]["mean"] == pytest.approx(0.5) and held_out["loss"]["after"]["stderr"] > 0
    if kind == "pairs_file":
        assert held_out["rewards/margins"]["after"]["mean"] > 0 and "rewards/separation" not in held_out
        return
    assert held_out["rewards/separation"]["before"] == {"mean": 0.5, "stderr": 0.0, "count": 14}
    counts = [held_out[name]["after"]["count"] for name in ("rewards/chosen", "rewards/rejected")]
    assert sum(counts) == 14 and min(counts) > 0
    assert sum("eval/rewards/separation" in line for line in lines) == 3
    assert "desirable above undesirable" in done.stdout


def test_a_step_of_one_record_is_refused(command, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file)]
    done = command([*TRAIN, *flags, "--per_device_train_batch_size", "1", "--output_dir", str(tmp_path / "run")])
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line and "apo_zero_unpaired" in line], done.stderr
