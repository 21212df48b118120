"""Every command of every page: known to a test that runs it, its flags taken, and (slowly) run with shortened steps.

What needs launchers over several processes or hosts is run here by one process; ``ELSEWHERE`` names the tests that
start them, and those that run whole pages.
"""

import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.generate import generate_corpus, generate_pairs, write_jsonl
from diffdpo.cli.flags import parse_config
from diffdpo.config import PairsConfig, SftConfig, TrainConfig
from tests.docs.lines import Line, all_lines, in_place
from tests.support.paths import ROOT

ELSEWHERE = {
    ("docs/evaluation.md", ""): "tests/docs/test_page_of_evaluation.py",
    ("docs/quickstart.md", ""): "tests/docs/test_pages_of_tracking.py",
    ("docs/tracking.md", "diffdpo compare"): "tests/docs/test_pages_of_tracking.py",
    ("docs/tracking.md", "diffdpo sweep"): "tests/docs/test_pages_of_tracking.py",
    ("docs/tracking.md", "mlflow ui"): "tests/docs/test_pages_of_tracking.py",
    ("docs/tracking.md", "python -m diffdpo.tracking"): "tests/docs/test_pages_of_tracking.py",
    ("README.md", "python3 -m venv"): ".ci/run",
    ("launch/README.md", "torchrun --nnodes"): "tests/cluster/test_hosts.py",
    ("launch/README.md", "torchrun --nnodes 1:3"): "tests/cluster/test_elastic.py",
    ("launch/README.md", "deepspeed --hostfile"): "tests/cluster/test_hosts.py",
    ("launch/README.md", "accelerate launch"): "tests/cluster/accelerated.py",
    ("launch/README.md", "sbatch"): "tests/cluster/test_slurm.py",
    ("recipes/llada8b_full.yaml", ""): "tests/cluster/test_ds_configs.py",
    ("docs/on_policy.md", "python launch/iterate.py"): "tests/end_to_end/test_on_policy.py",
    ("docs/on_policy.md", "torchrun --nproc_per_node 8 launch/make_pairs.py"): "tests/end_to_end/test_on_policy.py",
    ("docs/scaling.md", "python -m benchmarks.scaling --model"): "benchmarks/scaling.py",
    ("docs/scaling.md", "torchrun --nproc_per_node 8 launch/train.py"): "tests/distributed/test_row_slices.py",
}
"""(page, how its line begins) -> what runs it."""

SHORT = {
    "--max_steps": "2",
    "--max_eval_pairs": "4",
    "--num_eval_problems": "1",
    "--per_device_train_batch_size": "2",
    "--gradient_accumulation_steps": "1",
    "--num_mc_samples": "2",
}
TRAINING = {"train": TrainConfig, "sft": SftConfig, "make_pairs": PairsConfig}


def runner_of(line: Line) -> str | None:
    """What else runs it; None: this file."""
    begins = [key for key in ELSEWHERE if key[0] == line.page and line.text.startswith(key[1])]
    return ELSEWHERE[max(begins, key=lambda key: len(key[1]))] if begins else None


def here() -> list[Line]:
    """The lines that this file runs, each text once; what trains a model stands before what goes on with it."""
    once = {line.text: line for line in all_lines() if runner_of(line) is None}
    return sorted(once.values(), key=lambda line: ("launch/sft.py" not in line.text, line.page))


def command_of(line: Line) -> tuple[str, list[str]]:
    """(command, its words); launchers are taken off: one process runs it."""
    words = line.words
    if words[0] == "diffdpo":
        return words[1], words[2:]
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    at = next(number for number, word in enumerate(words) if word.startswith("launch/"))
    return Path(words[at]).stem, words[at + 1 :]


LINES = here()


def test_every_line_is_one_that_something_runs():
    for line in all_lines():
        runner = runner_of(line)
        assert runner is None or (ROOT / runner).exists(), line
        if runner is None:
            command, _ = command_of(line)
            known = (*TRAINING, "plan", "export", "data_pipeline", "benchmarks.scaling")
            assert command in known, f"{line}: name what runs it in ELSEWHERE"
    assert len(LINES) > 25


OF_FLAGS = [line for line in LINES if command_of(line)[0] in TRAINING and "adapter_name" not in line.text]


@pytest.mark.parametrize("line", OF_FLAGS, ids=lambda line: line.text)
def test_its_flags_are_taken(line, monkeypatch, tmp_path):
    """A fast sample of the below."""
    monkeypatch.chdir(tmp_path)
    command, flags = command_of(line)
    words = in_place(flags, {name: str(ROOT / "README.md") for name in flags if name.endswith(".jsonl")})
    for name in [word for word in words if word.startswith("outputs/")]:
        Path(name).mkdir(parents=True, exist_ok=True)
    assert parse_config(TRAINING[command], words, "")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, command, tiny_model, pairs_file) -> Path:
    """A run with LoRA and its final adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    line = ["train", "--use_peft", "--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file)]
    line += [word for flag in SHORT.items() for word in flag] + ["--output_dir", str(folder), "--tracking_uri", "none"]
    done = command([sys.executable, "-m", "diffdpo", *line], timeout=400)
    assert done.returncode == 0, done.stderr
    return folder / "final"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the lines run, one after the other, with what they take for granted."""
    place = tmp_path_factory.mktemp("pages")
    for name in ("pairs.jsonl", "more.jsonl"):
        write_jsonl(generate_pairs(40, seed=1), place / name)
    answers = list(generate_corpus(40, seed=2))
    for name in ("gsm8k_train.jsonl", "problems.jsonl"):
        rows = (
            {"question": row["prompt"], "answer": f"{row['completion']}\n#### {n}"} for n, row in enumerate(answers)
        )
        write_jsonl(rows, place / name)
    return place


def stand_ins(line: Line, place: Path, tiny_model: Path, adapter: Path) -> dict[str, str]:
    """What a reader has in the place of a line's names. ``mine.jsonl`` is a file of the layout that the line reads."""
    rows = list(generate_pairs(40, seed=3))
    if "--columns" in line.text:
        rows = [
            {"context": f"Story {n}.", "ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]}
            | ({"persona": "You count well."} if "persona" in line.text else {})
            for n, row in enumerate(rows)
        ]
        if "persona" in line.text:
            rows = [{key: value for key, value in row.items() if key != "context"} for row in rows]
    write_jsonl(iter(rows), place / "mine.jsonl")
    models = ("GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B", "JetLM/SDAR-8B-Chat")
    named = dict.fromkeys((*models, "inclusionAI/LLaDA2.0-mini", "DIR", "MODEL", "BASE"), str(tiny_model))
    named |= {"A": str(adapter), "SOURCE...": "pairs.jsonl", "config.json": str(ROOT / "docs/shapes/llada8b.json")}
    named |= {"diffdpo/pretrained/arithmetic": str(ROOT / "diffdpo/pretrained/arithmetic")}
    if line.page in ("docs/models.md", "docs/training.md"):
        named |= {"outputs/run/final": str(adapter), "outputs/first/final": str(adapter)}
    return named


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.text)
def test_it_runs(line, folder, command, tiny_model, adapter):
    name, flags = command_of(line)
    words = in_place(flags, stand_ins(line, folder, tiny_model, adapter))
    for out in [Path(b) for a, b in pairwise(words) if a in ("--output_dir", "--output", "--out")]:
        if line.page != "docs/scaling.md":  # lines of several pages leave the same folders
            shutil.rmtree(folder / out, ignore_errors=True)
    if name in ("train", "sft"):
        words += [word for flag in SHORT.items() for word in flag] + ["--tracking_uri", "none"]
        if "--train_data" not in words:
            words += ["--num_generated_pairs", "40"] if name == "train" else ["--num_generated_answers", "200"]
        if "--output_dir" not in words:
            words += ["--output_dir", f"outputs/{len(list(folder.rglob('metrics.jsonl')))}"]
    if name == "make_pairs":
        words += ["--num_samples", "4", "--steps", "16"]
    module = [name] if "." in name or name == "data_pipeline" else ["diffdpo", name.replace("_", "-")]
    environment = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "PYTHONHASHSEED": "0"}
    done = command([sys.executable, "-m", *module, *words], cwd=folder, timeout=800, **environment)
    assert done.returncode == 0, f"{shlex.join([name, *words])}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
