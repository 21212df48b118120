"""`diffdpo evaluate`: figures, comparisons, going on after a kill, several processes, and a user's mistakes."""

import json
import os
import signal
import subprocess
import time

import pytest

from data_pipeline.errors import DataError
from data_pipeline.generate import generate_choices, generate_pairs
from diffdpo.cli import evaluate, score
from diffdpo.errors import UserError
from tests.support.paths import ROOT

NO_SAMPLES = ["--num_mc_samples", "2"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pairs = list(generate_pairs(12, seed=3, split="eval"))
    gsm = [{"question": row["prompt"], "answer": f"{row['chosen']}\n#### {row['meta']['answer']}"} for row in pairs]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "gsm.jsonl", gsm)
    write(folder / "choices.jsonl", generate_choices(6, seed=1))
    return folder


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    from diffdpo.models.architecture.from_scratch import new_model
    from diffdpo.models.load import load_model, save_model

    folder = tmp_path_factory.mktemp("other_model")
    tokenizer = load_model(str(tiny_model)).tokenizer
    save_model(new_model(tokenizer, width=32, layers=2, heads=2, seed=5), tokenizer, folder)
    return folder


def report_of(tmp_path, *argv, name="report.json"):
    evaluate.main([*map(str, argv), "--output", str(tmp_path / name)])
    return json.loads((tmp_path / name).read_text())


def items_of(tmp_path, name="report"):
    return {path.name: path.read_bytes() for path in (tmp_path / f"{name}.items").glob("*.jsonl")}


def test_pairs_have_the_scores_of_score_and_its_figures(files, tiny_model, other_model, tmp_path):
    models = ["--model_name_or_path", tiny_model, "--ref_model_name_or_path", other_model]
    shared = [*models, "--pairs", files / "pairs.jsonl", "--num_mc_samples", "4"]
    found = report_of(tmp_path, *shared)["results"][0]
    score.main([*map(str, shared), "--output", str(tmp_path / "scores.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    (items,) = items_of(tmp_path).values()
    for line, other in zip(map(json.loads, items.splitlines()), lines, strict=True):
        assert line["chosen"]["score"] == pytest.approx(other["chosen"]["score"], rel=1e-6)
    margins = [0.1 * (line["chosen"]["log_ratio"] - line["rejected"]["log_ratio"]) for line in lines]
    figures = found["figures"]
    assert figures["margin"]["mean"] == pytest.approx(sum(margins) / 12, rel=1e-5)
    assert figures["accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / 12)
    assert figures["accuracy"]["low"] <= figures["accuracy"]["mean"] <= figures["accuracy"]["high"]
    assert sum(each["count"] for each in figures["by_length"].values()) == 12
    assert set(figures["by_source"]) == {"generated"} and sum(b["count"] for b in figures["calibration"]) == 12
    assert figures["perplexity"]["mean"] > 1 and 0 <= figures["auc"]["mean"] <= 1


def test_the_sampler_s_order_judges_pairs_and_choices(files, tiny_model, other_model, tmp_path):
    order = ["--score_estimator", "sampler_order", "--limit", 4]
    tasks = ["--pairs", files / "pairs.jsonl", "--task", "pairs", f"multiple_choice@{files}/choices.jsonl"]
    report_of(tmp_path, "--model_name_or_path", tiny_model, *tasks, *order)
    pairs, choices = sorted(items_of(tmp_path).values(), key=lambda text: b"scores" in text)
    for line in map(json.loads, pairs.splitlines()):
        assert line["chosen"]["score"] < 0 == line["chosen"]["stderr"]
    for line in map(json.loads, choices.splitlines()):
        assert max(line["scores"]) < 0 and not any(line["stderr"])
    words = ["--model_name_or_path", tiny_model, "--pairs", files / "pairs.jsonl", *order[:2]]
    score.main([*map(str, words), "--output", str(tmp_path / "scores.jsonl")])
    alone = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()][:4]
    for line, other in zip(map(json.loads, pairs.splitlines()), alone, strict=True):
        assert line["chosen"]["score"] == pytest.approx(other["chosen"]["score"], rel=1e-5)


def test_a_model_against_itself_is_a_tie_everywhere(files, tiny_model, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--ref_model_name_or_path", tiny_model, *NO_SAMPLES]
    figures = report_of(tmp_path, *flags, "--pairs", files / "pairs.jsonl")["results"][0]["figures"]
    assert figures["accuracy"]["mean"] == figures["auc"]["mean"] == 0.5 and figures["margin"]["mean"] == 0.0
    assert figures["calibration_error"]["mean"] == 0.0  # half sure, and right in half


def test_two_models_on_several_tasks_and_samplers_are_compared(files, tiny_model, other_model, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def longer(answer, truth, prompt):\n    return min(1.0, len(answer) / 100)\n")
    tasks = [
        f"gsm8k@{files}/gsm.jsonl",
        f"{judge}:longer@{files}/pairs.jsonl",
        f"multiple_choice@{files}/choices.jsonl",
    ]
    models = [tiny_model, other_model]
    sampling = ["--gen_length", 16, "--block_length", 16, "--sampler_grid", "steps=4,8", "--limit", 4]
    report = report_of(tmp_path, "--model_name_or_path", *models, "--task", *tasks, *sampling, *NO_SAMPLES)
    assert [each["task"].split(":")[-1] for each in report["results"]] == 2 * [
        *("gsm8k", "gsm8k", "longer", "longer", "multiple_choice")
    ]
    assert [each["sampler"]["steps"] for each in report["results"][:4]] == [4, 8, 4, 8]
    against = [(each["task_label"], each["win"] + each["tie"] + each["lose"]) for each in report["comparisons"]]
    assert len(against) == 5 + 2 and all(count == 4 for _, count in against)  # between models, and between samplers
    chance = report["results"][4]["figures"]["chance"]["mean"]
    assert chance == 0.25 and report["results"][4]["items"] == 4


def test_broken_off_it_goes_on_and_scores_no_record_twice(files, tiny_model, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--pairs", files / "pairs.jsonl", *NO_SAMPLES, "--batch_size", 2]
    whole = report_of(tmp_path, *flags)
    ((name, before),) = items_of(tmp_path).items()
    lines = before.splitlines(keepends=True)
    path = tmp_path / "report.items" / name
    path.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    assert report_of(tmp_path, *flags) == whole and items_of(tmp_path)[name] == before
    (tmp_path / "report.json").unlink()
    stamp = path.stat().st_mtime_ns
    assert report_of(tmp_path, *flags)["results"] == whole["results"] and path.read_bytes() == before
    assert path.stat().st_mtime_ns == stamp or path.read_bytes() == before
    other = report_of(tmp_path, *flags, "--seed", 1)  # a file of its own
    assert len(items_of(tmp_path)) == 2 and other["results"] != whole["results"]


def test_killed_it_goes_on(files, tiny_model, tmp_path, python):
    words = ["--model_name_or_path", str(tiny_model), "--pairs", str(files / "pairs.jsonl"), "--num_mc_samples", "64"]
    words += ["--batch_size", "1", "--output", str(tmp_path / "report.json")]
    line = [python, "launch/evaluate.py", *words]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any(items_of(tmp_path).values()) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (before,) = items_of(tmp_path).values()
    assert before and not (tmp_path / "report.json").exists()
    evaluate.main(words)
    (after,) = items_of(tmp_path).values()
    whole = before[: before.rfind(b"\n") + 1]
    assert after.startswith(whole) and len({json.loads(each)["id"] for each in after.splitlines()}) == 12
    assert after.count(b"\n") == 12


def test_two_processes_with_three_records_say_the_same(files, tiny_model, tmp_path, command, python, free_port):
    task = ["--task", "pairs", f"gsm8k@{files}/gsm.jsonl", f"multiple_choice@{files}/choices.jsonl"]
    flags = ["--model_name_or_path", tiny_model, "--pairs", files / "pairs.jsonl", "--limit", 3, *NO_SAMPLES, *task]
    flags = [*map(str, flags), "--gen_length", "16", "--temperature", "0.7", "--batch_size", "1"]
    one = report_of(tmp_path, *flags)
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    done = command([*launcher, "launch/evaluate.py", *flags, "--output", str(tmp_path / "two.json")], timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two.json").read_text())
    for a, b in zip(one["results"], two["results"], strict=True):
        for name, figure in a["figures"].items():
            if isinstance(figure, dict) and "mean" in figure:
                assert figure["mean"] == pytest.approx(b["figures"][name]["mean"], rel=1e-5), name
    answers = [
        sorted(
            each["answer"]
            for data in items_of(tmp_path, name).values()
            for each in map(json.loads, data.splitlines())
            if "answer" in each
        )
        for name in ("report", "two")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 3


@pytest.fixture(scope="module")
def run_folder(files, tmp_path_factory, tiny_model):
    """A short run with an adapter and its checkpoints."""
    from diffdpo.cli import train

    folder = tmp_path_factory.mktemp("runs") / "adapted"
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(files / "pairs.jsonl"), "--max_steps", "3"]
    flags += ["--save_steps", "1", "--use_peft", "--learning_rate", "1e-2", "--tracking_uri", "none", "--eval_task"]
    flags += ["none", "--num_mc_samples", "1", "--eval_data", str(files / "pairs.jsonl"), "--max_length", "256"]
    train.main([*flags, "--max_prompt_length", "128", "--output_dir", str(folder)])
    return folder


def test_a_run_s_folder_is_a_curve_over_its_checkpoints(run_folder, files, tmp_path, capsys):
    flags = ["--pairs", files / "pairs.jsonl", *NO_SAMPLES]
    report = report_of(
        tmp_path, "--model_name_or_path", run_folder, *flags, "--tracking_uri", f"sqlite:///{tmp_path}/m.db"
    )
    assert [each["step"] for each in report["results"]] == [1, 2, 3]
    perplexities = [each["figures"]["perplexity"]["mean"] for each in report["results"]]
    assert len(set(perplexities)) == 3
    one = report_of(tmp_path, "--model_name_or_path", run_folder / "checkpoints" / "step-2", *flags, name="one.json")
    assert one["results"][0]["figures"] == report["results"][1]["figures"]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/m.db")
    (run,) = client.search_runs([client.get_experiment_by_name("diffdpo").experiment_id])
    history = client.get_metric_history(run.info.run_id, "pairs/perplexity")
    assert [(point.step, point.value) for point in history] == list(zip([1, 2, 3], perplexities, strict=True))


def test_a_checkpoint_of_a_fully_trained_run_is_read_without_its_engine(files, tiny_model, tmp_path):
    from diffdpo.cli import train
    from diffdpo.models.load import load_model
    from diffdpo.training.checkpoint_model import load_checkpoint

    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(files / "pairs.jsonl"), "--max_steps", "2"]
    flags += ["--save_steps", "1", "--learning_rate", "1e-3", "--tracking_uri", "none", "--eval_task", "none"]
    flags += ["--num_mc_samples", "1", "--eval_fraction", "0", "--max_length", "256", "--max_prompt_length", "128"]
    train.main([*flags, "--output_dir", str(tmp_path / "whole")])
    first, start = load_checkpoint(str(tmp_path / "whole/checkpoints/step-1")), load_model(str(tiny_model))
    moved = [not a.equal(b) for a, b in zip(first.model.parameters(), start.model.parameters(), strict=True)]
    assert all(moved) and not any(parameter.requires_grad for parameter in first.model.parameters())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--task", "arithmetik"], "is arithmetic meant"),
        (["--pairs", "{files}/pairs.jsonl", "--score_estimator", "sampler"], "unknown; choose one of .*sampler_order"),
        (["--task", "gsm8k"], "has no items"),
        (["--task", "gsm8k@"], "after the @"),
        ([], "nothing to evaluate on"),
        (["--pairs", "{files}/missing.jsonl"], "missing.jsonl"),
        (["--pairs", "{files}/empty.jsonl"], "no records"),
        (["--pairs", "{files}/broken.jsonl"], "broken.jsonl:2"),
        (["--task", "multiple_choice@{files}/gsm.jsonl"], "no choices"),
        (["--task", "gsm8k@{files}/plain.jsonl"], "none of its 1 records"),
        (["--task", "arithmetic", "--sampler_grid", "step=3"], "sampler_grid"),
        (["--task", "arithmetic", "--sampler_grid", "steps=x"], "whole number"),
        (["--pairs", "{files}/pairs.jsonl", "--sampler_grid", "steps=3"], "none is asked for"),
        (["--task", "arithmetic", "--gen_length", "40"], "must divide"),
        (["--task", "{files}/judge.py:fails@{files}/pairs.jsonl", "--gen_length", "16"], "ValueError: no idea"),
        (["--task", "{files}/judge.py:none@{files}/pairs.jsonl"], "has no function none"),
        (["--pairs", "{files}/pairs.jsonl", "--model_name_or_path", "{files}"], "no model config"),
        (["--pairs", "{files}/pairs.jsonl", "--output", "{files}/no/report.json"], "no folder"),
        (["--pairs", "{files}/pairs.jsonl", "--tracking_uri", "ftp://x"], "ftp"),
        (["--pairs", "{files}/pairs.jsonl", "--output", "{files}/pairs.jsonl"], "no report of this command"),
        (["--pairs", "{files}/pairs.jsonl", "--output", "{files}"], "no report of this command"),
        (["--task", "arithmetic", "--threshold", "2"], "between 0 and 1"),
        (["--pairs", "{files}/pairs.jsonl", "--model_name_or_path", "{model}", "{model}"], "twice"),
    ],
)
def test_a_mistake_is_told_in_one_line(flags, told, files, tiny_model):
    write(files / "empty.jsonl", [])
    (files / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    write(files / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    (files / "judge.py").write_text("def fails(answer, truth, prompt):\n    raise ValueError('no idea')\n")
    words = [word.format(files=files, model=tiny_model) for word in flags]
    if "--model_name_or_path" not in words:
        words += ["--model_name_or_path", str(tiny_model)]
    with pytest.raises((UserError, DataError), match=told) as error:
        evaluate.main([*words, "--limit", "2", *NO_SAMPLES])
    assert "\n" not in str(error.value)


def test_one_record_has_no_error_and_one_id_is_one_item(files, tiny_model, tmp_path, capsys):
    first = json.loads((files / "pairs.jsonl").read_text().splitlines()[0])
    file = write(tmp_path / "twice.jsonl", [first, {**first, "prompt": "another"}])
    report = report_of(tmp_path, "--model_name_or_path", tiny_model, "--pairs", file, *NO_SAMPLES)
    result = report["results"][0]
    assert (result["items"], result["left_out"]) == (1, 1) and result["figures"]["accuracy"]["stderr"] is None
    assert "another record has this id" in capsys.readouterr().err
    assert os.path.exists(tmp_path / "report.json")
