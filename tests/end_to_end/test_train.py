"""launch/train.py as a user meets it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch

from diffdpo.errors import RESUMABLE
from diffdpo.models.load import load_model

BIN = Path(sys.executable).parent
TRAIN = [sys.executable, "launch/train.py"]
ROOT = Path(__file__).parents[2]
SHORT = ["--num_generated_pairs", "64", "--max_eval_pairs", "16", "--num_eval_problems", "2"]


@pytest.fixture(scope="module")
def readme_run(command, tmp_path_factory):
    """The README's command, with few steps."""
    out = tmp_path_factory.mktemp("readme") / "run"
    line = "launch/train.py --ds_config ds_configs/4080_offload.json"
    assert f"deepspeed {line}" in (ROOT / "README.md").read_text()
    flags = ["--max_steps", "2", "--output_dir", str(out), *SHORT]
    done = command([str(BIN / "deepspeed"), *line.split(), *flags], timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_it_tells_what_it_did_and_where_things_are(readme_run):
    out, said = readme_run
    for part in ("ZeRO-2, optimizer on cpu", "ln 2 as it must be", "exact match", "mlflow ui", str(out), "before"):
        assert part in said


def test_it_leaves_every_file(readme_run):
    out, _ = readme_run
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "environment.json", "plots/curves.png"):
        assert (out / name).stat().st_size > 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["step"] == 1 and "loss" in line)
    assert step["loss"] == pytest.approx(0.69314718, abs=1e-5)
    named = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies noise/score_variance grad_norm"
    for key in [*named.split(), "learning_rate", "pairs_per_second", "tokens_per_second", "peak_memory_gib"]:
        assert key in step, key
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["pairs_per_second"] > 0
    held, weights = summary["held_memory_gib"]["device"], 4 * 863_000 / 2**30
    assert held["weights"] > 0.99 * weights and held["optimizer"] > 1.99 * weights and held["gradients"] > 0
    assert set(summary["held_out"]) >= {"rewards/accuracies", "rewards/margins", "exact_match"}


def test_mlflow_has_it_all(readme_run):
    out, _ = readme_run
    client = mlflow.MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    run = client.get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["beta"] == "0.1" and "max_steps=2" in run.data.tags["changed"]
    assert "| reward margin" in run.data.tags["mlflow.note.content"]
    used = {one.tags[0].value: one.dataset.digest for one in run.inputs.dataset_inputs}
    assert set(used) == {"training", "evaluation"} and used["training"] == run.data.params["data_fingerprint"]
    assert {"time/forward", "time/backward", "time/reference", "time/optimizer"} <= set(run.data.metrics)
    assert run.data.params["data_fingerprint"] and "mlflow.source.git.commit" in run.data.tags
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert len(client.get_metric_history(run.info.run_id, "eval/rewards/margins")) == 2
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names >= {
        "config.yaml",
        "asked.yaml",
        "ds_config.json",
        "plots",
        "summary.json",
        "held_out.json",
        "answers.json",
    }
    assert {file.path for file in client.list_artifacts(run.info.run_id, "plots")} == {
        "plots/curves.png",
        "plots/time.png",
        "plots/memory.png",
    }


def test_the_final_model_loads_with_one_call(readme_run):
    out, _ = readme_run
    loaded = load_model(str(out / "final"))
    ids = torch.tensor([loaded.tokenizer("Mia has 3 pens")["input_ids"]])
    assert torch.isfinite(loaded.model(ids).logits).all()
    assert (out / "final" / "README.md").read_text().startswith("---")


MISTAKES = [
    (["--bata", "1"], "--bata"),
    (["--ds_config", "nowhere.json"], "nowhere.json"),
    (["--train_data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--loss_type", "sigmoidal"], "sigmoidal"),
    (["--score_estimator", "guess"], "guess"),
    (["--model_name_or_path", "/nowhere"], "/nowhere"),
    (["--tracking_uri", "ftp://x"], "ftp://x"),
    (["--loss_type", "aot", "--segmentation", "none"], "--segmentation none"),
    (["--ds_config", "ds_configs/4080_offload.json", "--segmentation", "deferred"], "would undo the offload"),
    (["--ds_config", "ds_configs/zero3_nvme.json"], "/path/on/an/nvme/disk"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, flags, said):
    done = command([*TRAIN, "--output_dir", str(tmp_path / "run"), *flags])
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and said in lines[0], done.stderr
    assert not (tmp_path / "run").exists(), "a mistake must leave nothing behind"


def test_data_without_a_field_is_named_before_any_model_is_loaded(command, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    data = ["--train_data", str(tmp_path / "pairs.jsonl"), "--model_name_or_path", "/no/such/model"]
    done = command([*TRAIN, "--output_dir", str(tmp_path / "run"), *data])
    assert done.returncode == 2
    assert "pairs.jsonl" in done.stderr and "chosen" in done.stderr and "/no/such/model" not in done.stderr


def test_a_mistake_reaches_the_user_through_the_launcher(command, tmp_path):
    done = command([str(BIN / "deepspeed"), "launch/train.py", "--ds_config", "nowhere.json"])
    assert done.returncode == 2
    assert "nowhere.json" in next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_help_needs_no_torch(command):
    done = command([sys.executable, "-X", "importtime", "launch/train.py", "--help"])
    assert done.returncode == 0 and "--score_estimator" in done.stdout
    assert " torch\n" not in done.stderr and " deepspeed\n" not in done.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten(command, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    done = command([*TRAIN, "--output_dir", str(tmp_path)])
    assert done.returncode == 2 and "holds a run already" in done.stderr


def test_an_adapter_is_trained_against_the_policy_without_it(command, tiny_model, pairs_file, tmp_path):
    out = tmp_path / "run"
    flags = ["--use_peft", "--lora_r", "4", "--max_steps", "3", "--learning_rate", "1e-2", "--warmup_steps", "0"]
    flags += ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--tracking_uri", "none"]
    done = command([*TRAIN, *flags, "--max_length", "70", "--max_prompt_length", "60", "--output_dir", str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the policy with its adapter off" in done.stdout and "cut to fit max_length 70" in done.stdout
    curve = [loss for _, loss in losses(out)]
    assert curve[0] == pytest.approx(0.69314718, abs=1e-5) and curve[-1] < curve[0]
    assert (out / "final" / "adapter_config.json").exists() and not (out / "final" / "model.safetensors").exists()
    ids = torch.tensor([[5, 6, 7]])
    adapted, base = load_model(str(out / "final")).model, load_model(str(tiny_model)).model
    assert not torch.equal(adapted(ids).logits, base(ids).logits)


# ------------------------------------------------------------------------------------------------- resumption


def flags_of(tiny_model, pairs_file, out: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--output_dir", str(out)),
        *("--max_steps", "8", "--save_steps", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4"),
        *("--tracking_uri", "none", "--max_length", "128", "--max_prompt_length", "64", *more),
    ]


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def interrupt(arguments: list[str], out: Path, *, after: int, how: int) -> int:
    """Start a run and send it a signal when its journal has so many steps; the exit code."""
    process = subprocess.Popen([*TRAIN, *arguments], cwd=ROOT, env=os.environ.copy())
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and len(losses(out)) >= after:
                process.send_signal(how)
                break
            time.sleep(0.01)
        return process.wait(timeout=120)
    finally:
        process.kill()


def test_a_run_that_diverges_says_so_and_is_recorded_as_failed(command, tiny_model, pairs_file, tmp_path):
    out = tmp_path / "a run?"
    arguments = flags_of(tiny_model, pairs_file, out, "--tracking_uri", f"sqlite:///{tmp_path}/mlflow.db")
    done = command([*TRAIN, *arguments, "--learning_rate", "1e30", "--warmup_steps", "0", "--max_grad_norm", "0"])
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "a smaller --learning_rate" in done.stderr
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] > 1 and None in (last["loss"], last["grad_norm"])
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id).info.status == "FAILED"
    # the step that ended it, taken again with the weights before it
    culprit, before = out / f"culprit-step-{last['step']}.json", sorted(out.rglob("*"))
    told = shlex.split(done.stderr.rpartition("--replay ")[2])[0].rstrip(";")
    assert Path(told) == culprit, "what is told can be pasted"
    again = command([*TRAIN, "--config", str(out / "config.yaml"), "--replay", told])
    assert again.returncode == 0, again.stderr[-3000:]
    then = json.loads(culprit.read_text())
    line = next(line for line in again.stdout.splitlines() if line.startswith(f"step {last['step']}: "))
    numbers = f"loss {then['loss']}, gradient norm {then['grad_norm']}"
    assert line == f"step {last['step']}: {numbers}; in the run {numbers}"
    records = [line for line in again.stdout.splitlines() if "<- not finite" in line]
    assert records and all(any(name in line for name in then["ranks"][0][0]["ids"]) for line in records)
    assert sorted(out.rglob("*")) == before, "a replay writes nothing"


@pytest.mark.slow
def test_a_killed_run_starts_itself_again_and_gives_the_curve_of_one(
    command, tiny_model, pairs_file, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    line = [*TRAIN, *flags_of(tiny_model, pairs_file, out), "--max_restarts", "2"]
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ.copy())
    try:
        until = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
    assert losses(out) == uninterrupted


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_which_one_is_killed_start_themselves_again(tiny_model, pairs_file, tmp_path):
    out = tmp_path / "run"
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "launch/train.py"]
    line = [*torchrun, *flags_of(tiny_model, pairs_file, out), "--max_restarts", "1"]
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ.copy())
    try:
        until = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        ranks = [psutil.Process(process.pid).children()[n].children()[0] for n in (0, 1)]
        ranks[1].kill()
        assert process.wait(timeout=240) == 0
        assert not any(rank.is_running() for rank in ranks)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert [step for step, _ in losses(out)] == list(range(1, 9))


@pytest.fixture(scope="module")
def uninterrupted(command, tiny_model, pairs_file, tmp_path_factory) -> list[tuple[int, float]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command([*TRAIN, *flags_of(tiny_model, pairs_file, out)])
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_an_interrupted_run_goes_on_to_the_bit(command, tiny_model, pairs_file, tmp_path, uninterrupted, how):
    out = tmp_path / "run"
    arguments = flags_of(tiny_model, pairs_file, out)
    code = interrupt(arguments, out, after=5, how=how)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else RESUMABLE)
    assert len(losses(out)) < 8, "the run must have been stopped before its end for this test to mean anything"
    done = command([*TRAIN, *arguments, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == uninterrupted
    assert "Warning" not in done.stderr, "nothing that a user could act on"


def test_a_stopped_run_is_recorded_as_killed_and_goes_on_with_two_processes(
    command, tiny_model, pairs_file, tmp_path, uninterrupted
):
    """Another world size: the same samples with the same noise, hence the same curve up to rounding."""
    out, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    arguments = flags_of(tiny_model, pairs_file, out, "--tracking_uri", uri)
    assert interrupt(arguments, out, after=3, how=signal.SIGTERM) == RESUMABLE
    sent = command([sys.executable, "-m", "diffdpo.tracking", str(out)])  # what a slow disk kept from being sent
    assert sent.returncode == 0, sent.stderr
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "KILLED"
    halves = ["--per_device_train_batch_size", "2", "--resume_from_checkpoint", "latest"]
    launcher = [str(BIN / "torchrun"), "--nproc_per_node", "2", "launch/train.py"]
    done = command([*launcher, *arguments, *halves])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step for step, _ in losses(out)] == [step for step, _ in uninterrupted]
    for (_, found), (_, expected) in zip(losses(out), uninterrupted, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_a_finished_run_is_not_undone_by_fewer_steps(command, tiny_model, pairs_file, tmp_path):
    out = tmp_path / "run"
    arguments = flags_of(tiny_model, pairs_file, out)
    assert command([*TRAIN, *arguments]).returncode == 0
    journal, weights = (out / "metrics.jsonl").read_bytes(), (out / "final" / "model.safetensors").read_bytes()
    again = command([*TRAIN, *arguments, "--max_steps", "2", "--resume_from_checkpoint", "latest"])
    assert again.returncode == 2 and "has taken 6 steps already" in again.stderr
    assert (out / "metrics.jsonl").read_bytes() == journal
    assert (out / "final" / "model.safetensors").read_bytes() == weights


def test_a_killed_run_goes_on_to_the_bit_under_deepspeed(command, tiny_model, pairs_file, tmp_path):
    arguments = flags_of(tiny_model, pairs_file, tmp_path / "run", "--ds_config", "ds_configs/4080_offload.json")
    interrupt(arguments, tmp_path / "run", after=5, how=signal.SIGKILL)
    assert len(losses(tmp_path / "run")) < 8
    shutil.copytree(tmp_path / "run", tmp_path / "plain")
    again = ["--resume_from_checkpoint", "latest"]
    for out, more in ((tmp_path / "run", again), (tmp_path / "whole", [])):
        done = command([*TRAIN, *arguments, "--output_dir", str(out), *more])
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    done = command([*TRAIN, *flags_of(tiny_model, pairs_file, tmp_path / "plain"), *again])
    assert done.returncode == 0, done.stderr
    assert "--engine was deepspeed and is plain" in (tmp_path / "plain" / "metrics.jsonl").read_text()
    pairs = zip(losses(tmp_path / "plain"), losses(tmp_path / "whole"), strict=True)
    assert all(found == pytest.approx(expected, rel=1e-5) for found, expected in pairs), "plain torch reads it too"


def test_precomputed_reference_scores_give_the_same_run(command, tiny_model, pairs_file, tmp_path, uninterrupted):
    out = tmp_path / "run"
    done = command([*TRAIN, *flags_of(tiny_model, pairs_file, out), "--reference", "precomputed"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == uninterrupted, "to the bit"
    assert "precomputed scores in" in done.stdout and "ln 2 as it must be" in done.stdout


@pytest.mark.slow
def test_a_killed_run_on_precomputed_scores_goes_on_to_the_bit(
    command, tiny_model, pairs_file, tmp_path, uninterrupted
):
    out = tmp_path / "run"
    arguments = flags_of(tiny_model, pairs_file, out, "--reference", "precomputed")
    assert interrupt(arguments, out, after=5, how=signal.SIGKILL) == -signal.SIGKILL
    assert len(losses(out)) < 8, "the run must have been stopped before its end for this test to mean anything"
    done = command([*TRAIN, *arguments, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == uninterrupted
