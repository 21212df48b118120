"""The command `diffdpo`, alone and under launchers, from another folder than the project's."""

import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

BIN = Path(sys.executable).parent
FLAGS = ["--max_steps", "2", "--num_eval_problems", "0", "--eval_fraction", "0", "--per_device_train_batch_size", "4"]
FLAGS += ["--tracking_uri", "none"]
LAUNCHERS = {
    "python": [sys.executable, "-m", "diffdpo", "train"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "1", "-m", "diffdpo", "train"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m", "diffdpo", "train"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "1", "--module", "diffdpo", "train"],
}


def data_flags(tiny_model, pairs_file, folder):
    return ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(folder)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_trains_from_any_folder(launcher, command, tiny_model, pairs_file, tmp_path, free_port):
    start = list(LAUNCHERS[launcher])
    if launcher in ("accelerate", "deepspeed"):
        port = {"accelerate": "--main_process_port", "deepspeed": "--master_port"}[launcher]
        start[1 + (launcher == "accelerate") : 1 + (launcher == "accelerate")] = [port, str(free_port)]
    flags = [*data_flags(tiny_model, pairs_file, tmp_path / "run"), *FLAGS]
    done = command([*start, *flags], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_there_is_and_a_word_that_is_near(command, tmp_path):
    start = [sys.executable, "-m", "diffdpo"]
    done = command([*start, "--help"], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "export" in done.stdout and "accelerate launch" in done.stdout
    done = command([*start, "trian"], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "train is meant?" in done.stderr and len(done.stderr.splitlines()) == 1


def test_shipped_files_are_found_by_name(command, tmp_path):
    shape = str(ROOT / "docs/shapes/llada8b.json")
    flags = ["--ds_config", "4080_offload", "--config", "llada8b_qlora", "--model_name_or_path", shape]
    start = [sys.executable, "-m", "diffdpo", "plan", "--gpu", "RTX 4080"]
    done = command([*start, *flags], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "LoRA rank 16" in done.stdout, done.stderr
    done = command([*start, "--ds_config", "4080_ofload"], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "4080_offload is meant?" in done.stderr
