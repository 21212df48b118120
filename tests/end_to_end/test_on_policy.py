"""make-pairs and iterate as users start them: processes of their own, killed with SIGKILL and started again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

JUDGE = "def even(answer, truth, prompt):\n    return len(answer) % 2 == 0\n"
FLAGS = ["--num_samples", "4", "--gen_length", "16", "--batch_size", "4", "--verifier", "judge.py:even"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "prompts.txt").write_text("".join(f"{i} + {i} =\n" for i in range(40)))
    return tmp_path


def make(command, folder, tiny_model, out, *launcher):
    argv = [*FLAGS, "--model_name_or_path", str(tiny_model), "--prompts", "prompts.txt", "--output_dir", out]
    start = launcher or (sys.executable, "-m", "diffdpo", "make-pairs")
    done = command([*start, *argv], cwd=folder, timeout=240, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def killed(folder, argv, until, *, seconds=120):
    """Start a command, kill it with SIGKILL as soon as ``until()`` holds; the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        argv, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + seconds
        while not until() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
    return process.wait(timeout=30)


@pytest.mark.slow
def test_make_pairs_killed_twice_and_by_two_processes_is_the_same_file(command, folder, tiny_model, free_port):
    make(command, folder, tiny_model, "whole")
    argv = [sys.executable, "-m", "diffdpo", "make-pairs", *FLAGS, "--model_name_or_path", str(tiny_model)]
    for parts in (1, 4):
        path = folder / "killed" / "parts"
        status = killed(
            folder,
            [*argv, "--prompts", "prompts.txt", "--output_dir", "killed"],
            lambda path=path, parts=parts: path.is_dir() and len(list(path.glob("*.jsonl"))) >= parts,
        )
        assert status == -signal.SIGKILL
    make(command, folder, tiny_model, "killed")
    two = [str(os.path.join(os.path.dirname(sys.executable), "torchrun")), "--nproc_per_node", "2"]
    make(command, folder, tiny_model, "two", *two, "--master_port", str(free_port), str(ROOT / "launch/make_pairs.py"))
    for name in ("answers.jsonl", "pairs.jsonl"):
        whole = (folder / "whole" / name).read_bytes()
        assert whole and (folder / "killed" / name).read_bytes() == whole == (folder / "two" / name).read_bytes()


@pytest.mark.slow
def test_iterate_killed_while_it_trains_leaves_nobody_behind_and_goes_on(command, folder, tiny_model, pairs_file):
    recipe = {
        "rounds": 2,
        "prompts": "prompts.txt",
        "prompts_per_round": 8,
        "model_name_or_path": str(tiny_model),
        "make_pairs": {"num_samples": 4, "gen_length": 16, "batch_size": 16, "verifier": "judge.py:even"},
        "train": {
            "eval_data": str(pairs_file),
            "max_steps": 6,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_length": 96,
            "max_prompt_length": 64,
            "max_eval_pairs": 4,
            "num_eval_problems": 0,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    argv = [sys.executable, "-m", "diffdpo", "iterate", "recipe.yaml", "--output_dir"]

    def finish(out):
        done = command([*argv, out], cwd=folder, timeout=280, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return (folder / out / "round-2" / "train" / "final" / "model.safetensors").read_bytes()

    checkpoint = folder / "killed" / "round-1" / "train" / "checkpoints" / "step-2"
    assert killed(folder, [*argv, "killed"], checkpoint.is_dir) == -signal.SIGKILL
    assert finish("killed") == finish("whole"), "a child that had gone on training would hold the folder"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    parent = (folder / "whole" / "mlflow_parent_run").read_text()
    runs = client.search_runs([client.get_run(parent).info.experiment_id])
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent for run in runs) == 2
