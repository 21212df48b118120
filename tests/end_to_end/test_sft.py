"""launch/sft.py: a new model learns, and what it leaves can be trained further."""

import json
import sys

import torch

from diffdpo.models.load import load_model

SFT = [sys.executable, "launch/sft.py"]
SMALL = ["--width", "32", "--layers", "1", "--heads", "2", "--vocab_size", "300", "--tracking_uri", "none"]
SHORT = ["--num_eval_problems", "2", "--max_eval_pairs", "8", "--max_length", "128", "--max_prompt_length", "64"]


def test_a_new_model_learns_and_loads(command, tmp_path):
    out = tmp_path / "run"
    flags = ["--num_generated_answers", "400", "--max_steps", "12", "--warmup_steps", "2", "--answer_canvas", "48"]
    done = command([*SFT, *SMALL, *SHORT, *flags, "--per_device_train_batch_size", "16", "--output_dir", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert held_out[-1] < held_out[0] - 0.3
    loaded = load_model(str(out / "final"))
    assert len(loaded.tokenizer) <= 300 and torch.isfinite(loaded.model(torch.tensor([[5, 6]])).logits).all()


def test_a_checkpoint_goes_on_with_one_s_own_answers(command, tiny_model, tmp_path):
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1?\n", "completion": str(n + 1)}) + "\n" for n in range(40)))
    out = tmp_path / "run"
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(data), "--max_steps", "2"]
    done = command([*SFT, *flags, *SHORT, "--tracking_uri", "none", "--output_dir", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "final" / "model.safetensors").exists()
    assert "held-out loss, nats a token (n = " in done.stdout


def test_undesirable_answers_are_counted_and_not_trained_on(command, tiny_model, tmp_path):
    data = tmp_path / "answers.jsonl"
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(data), "--max_steps", "1"]
    for right, code, said in (
        (30, 0, "30 answers, 10 undesirable ones (label false) are not trained on"),
        (0, 2, "all 40 answers are undesirable"),
    ):
        answers = [{"prompt": f"{n} + 1?\n", "completion": str(n + 1), "label": n < right} for n in range(40)]
        data.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        out = ["--eval_fraction", "0", "--tracking_uri", "none", "--output_dir", str(tmp_path / str(right))]
        done = command([*SFT, *flags, *SHORT, *out])
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr[-3000:]


def test_mistakes_are_one_line(command, tmp_path):
    done = command([*SFT, "--heads", "x"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
