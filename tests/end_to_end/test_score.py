"""launch/score.py as a user meets it: lines out, resumption, comparison of two models, one line for a mistake."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffdpo.config import ScoreConfig
from diffdpo.errors import UserError
from diffdpo.evaluation.score_models import load_models
from diffdpo.evaluation.score_pairs import Scorer
from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
from diffdpo.models.load import save_model
from launch import score

ROOT = Path(__file__).parents[2]
PAIRS = [
    {"id": "a", "prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"},
    {"id": "b", "prompt": "Say yes.", "chosen": "Yes", "rejected": "No, why?"},
    {"id": "c", "prompt": "x", "chosen": "y", "rejected": "zz"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models of one tokenizer, and a file of pairs."""
    folder = tmp_path_factory.mktemp("score")
    tokenizer = train_tokenizer([record["prompt"] for record in PAIRS], vocab_size=280)
    for name, seed in (("model", 0), ("other", 1)):
        save_model(
            new_model(tokenizer, width=16, layers=1, heads=2, seed=seed, max_length=64), tokenizer, folder / name
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    return folder


def lines(capsys, folder: Path, *flags: str) -> list[dict]:
    score.main(["--model_name_or_path", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"), *flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_a_pair(folder, capsys):
    found = lines(capsys, folder, "--num_mc_samples", "4")
    assert [line["id"] for line in found] == ["a", "b", "c"]
    for line in found:
        for side in ("chosen", "rejected"):
            assert set(line[side]) == {"score", "stderr", "tokens"}
            assert line[side]["score"] < 0 < line[side]["stderr"] and line[side]["tokens"] >= 2


def test_sampled_scores_agree_with_exact_ones(folder, capsys):
    exact = lines(capsys, folder, "--score_estimator", "exact")[0]["chosen"]
    sampled = lines(capsys, folder, "--score_estimator", "mask_count", "--num_mc_samples", "400")[0]["chosen"]
    assert exact["stderr"] == 0
    assert abs(exact["score"] - sampled["score"]) < 4 * sampled["stderr"] + 1e-4


def test_the_sampler_s_order_has_no_noise(folder, capsys):
    """It is another number than the ELBO, does not depend on n, and rewards are differences of it."""
    order = ("--score_estimator", "sampler_order")
    found = lines(capsys, folder, *order, "--num_mc_samples", "1")
    apart = lines(capsys, folder, *order, "--segment_rows", "1", "--batch_size", "2")
    for line, other in zip(found, apart, strict=True):
        for side in ("chosen", "rejected"):
            assert line[side]["score"] == pytest.approx(other[side]["score"], rel=1e-5) and line[side]["stderr"] == 0
    assert found[0]["chosen"]["score"] != lines(capsys, folder, "--score_estimator", "exact")[0]["chosen"]["score"]
    against = lines(capsys, folder, *order, "--ref_model_name_or_path", str(folder / "other"))
    for line in against:
        side = line["chosen"]
        assert side["log_ratio"] == pytest.approx(side["score"] - side["reference_score"], abs=1e-9)
        assert side["log_ratio_stderr"] == 0


def test_scores_do_not_depend_on_how_they_are_batched(folder, capsys):
    one = lines(capsys, folder, "--batch_size", "1", "--segment_rows", "3", "--num_mc_samples", "5")
    all_at_once = lines(capsys, folder, "--num_mc_samples", "5")
    for a, b in zip(one, all_at_once, strict=True):
        assert a["rejected"]["score"] == pytest.approx(b["rejected"]["score"], rel=1e-5)
    other_seed = lines(capsys, folder, "--num_mc_samples", "5", "--seed", "1")
    assert other_seed[1]["rejected"]["score"] != all_at_once[1]["rejected"]["score"]


def test_one_sample_has_no_standard_error(folder, capsys):
    assert lines(capsys, folder, "--num_mc_samples", "1")[0]["chosen"]["stderr"] is None


def test_a_model_against_itself_has_no_reward_and_against_another_the_difference(folder, capsys):
    same = lines(capsys, folder, "--ref_model_name_or_path", str(folder / "model"))
    assert all(line[side]["log_ratio"] == line[side]["log_ratio_stderr"] == 0 for line in same for side in ("chosen",))
    for line in lines(capsys, folder, "--ref_model_name_or_path", str(folder / "other")):
        side = line["rejected"]
        assert side["log_ratio"] == pytest.approx(side["score"] - side["reference_score"], abs=1e-4)
        assert side["log_ratio"] != 0


def test_output_resumes_after_a_torn_line(folder, capsys, tmp_path):
    output = tmp_path / "scores.jsonl"
    assert lines(capsys, folder, "--output", str(output)) == []
    whole = output.read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    output.write_bytes(first + second[:20])
    lines(capsys, folder, "--output", str(output))
    assert output.read_bytes() == whole
    lines(capsys, folder, "--output", str(output))
    assert output.read_bytes() == whole


def test_output_refuses_other_settings_and_files_it_did_not_write(folder, capsys, tmp_path):
    output = tmp_path / "scores.jsonl"
    lines(capsys, folder, "--output", str(output))
    with pytest.raises(UserError, match="--seed 0"):
        lines(capsys, folder, "--output", str(output), "--seed", "1")
    stranger = tmp_path / "notes.txt"
    stranger.write_text("mine\n")
    with pytest.raises(UserError, match="may hold anything"):
        lines(capsys, folder, "--output", str(stranger))
    assert stranger.read_text() == "mine\n"


def test_output_that_was_tampered_with_is_refused_in_one_line(folder, capsys, tmp_path):
    output = tmp_path / "scores.jsonl"
    lines(capsys, folder, "--output", str(output))
    whole = output.read_text()
    output.write_text("mine" + whole)
    with pytest.raises(UserError, match=r"scores\.jsonl:1 is no line"):
        lines(capsys, folder, "--output", str(output))
    output.write_text(whole)
    (tmp_path / "scores.jsonl.settings.json").write_text('{"seed": 0,')
    with pytest.raises(UserError, match="may hold anything"):
        lines(capsys, folder, "--output", str(output))


def test_records_with_an_id_met_before_are_left_out_and_counted(folder, tmp_path, capsys):
    """Also over a resume: which record an id stands for must not depend on where the run was broken off."""
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*PAIRS[:2], PAIRS[0], PAIRS[2]]))
    flags = ["--pairs", str(tmp_path / "twice.jsonl"), "--output", str(tmp_path / "out"), "--num_mc_samples", "1"]
    score.main(["--model_name_or_path", str(folder / "model"), *flags])
    assert "left out 1 whose id another record has\nscored 3" in capsys.readouterr().err
    written = (tmp_path / "out").read_text().splitlines(keepends=True)
    (tmp_path / "out").write_text("".join(written[:1]))
    score.main(["--model_name_or_path", str(folder / "model"), *flags])
    assert [json.loads(line)["id"] for line in (tmp_path / "out").read_text().splitlines()] == ["a", "b", "c"]


def test_killed_at_any_moment_it_goes_on(folder, tmp_path):
    """kill -9 in the middle of many batches; then the same lines as in one go."""
    records = [{**record, "id": f"{record['id']}{i}"} for i in range(60) for record in PAIRS]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--model_name_or_path", str(folder / "model"), "--pairs", str(tmp_path / "many.jsonl")]
    flags += ["--batch_size", "2", "--num_mc_samples", "8", "--output"]
    output = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "score.py"), *flags, str(output)])
    try:
        while process.poll() is None and not (output.exists() and output.stat().st_size > 1000):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 0 < len(output.read_bytes().splitlines()) < len(records)
    score.main([*flags, str(output)])
    score.main([*flags, str(tmp_path / "whole")])
    found, whole = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (output, tmp_path / "whole")
    )
    assert [line["id"] for line in found] == [line["id"] for line in whole] == [record["id"] for record in records]
    for a, b in zip(found, whole, strict=True):  # batches may be cut elsewhere, which moves the last digits
        assert a["chosen"]["score"] == pytest.approx(b["chosen"]["score"], rel=1e-5)


def test_exact_leaves_out_what_is_too_long_and_names_it(folder, capsys, tmp_path):
    record = {"id": "long-one", "prompt": "p", "chosen": "abcdefghijklmnopq", "rejected": "b"}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (PAIRS[0], record, PAIRS[2])))
    pairs = ["--pairs", str(tmp_path / "long.jsonl"), "--score_estimator", "exact"]
    score.main(["--model_name_or_path", str(folder / "model"), *pairs])
    told = capsys.readouterr()
    assert [json.loads(line)["id"] for line in told.out.splitlines()] == ["a", "c"]
    assert "left out long-one: too_long_for_exact (18 tokens" in told.err and "scored 2, left out 1" in told.err


def test_output_holds_the_scores_of_one_model_and_of_the_same_records(folder, capsys, tmp_path):
    model, pairs, output = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    shutil.copytree(folder / "model", model)
    pairs.write_text("".join(json.dumps(record) + "\n" for record in PAIRS[:2]))
    flags = ["--model_name_or_path", str(model), "--pairs", str(pairs), "--output", str(output)]
    score.main(flags)
    pairs.write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    score.main(flags)  # records added since are scored
    whole = output.read_bytes()
    assert whole.count(b"\n") == 3 and "scored 1, left out 0, already there 2" in capsys.readouterr().err
    pairs.write_text("".join(json.dumps(record | {"chosen": " 7"}) + "\n" for record in PAIRS))
    with pytest.raises(UserError, match="record 'a' of --pairs is not what --output holds"):
        score.main(flags)
    shutil.copy(folder / "other" / "model.safetensors", model)
    with pytest.raises(UserError, match="was written with --model_weights"):
        score.main(flags)
    assert output.read_bytes() == whole


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "score.py"), *flags], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((), "--pairs"),
        (("--pairs", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--pairs", "x", "--score_estimator", "elbo"), "mask_count_mirror"),
        (("--pairs", "x", "--num_mc_samples", "0"), "at least 1"),
        (("--pairs", "x", "--num_mc", "4"), "--num_mc_samples"),
        (("--pairs", "x", "--batch_size", "0"), "--batch_size"),
        (("--pairs", "x", "--max_length", "64"), "leaves no room"),
        (("--pairs", "x", "--device", "tpu"), "cuda:N"),
        (("--pairs", "x", "--output", "no/such/folder/f"), "no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, word):
    done = command(*flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and word in done.stderr and done.stdout == ""


def test_help_imports_no_torch():
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(ROOT / 'launch' / 'score.py')!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--score_estimator" in done.stdout


def test_models_are_in_eval_mode(folder):
    config = ScoreConfig(pairs="x", model_name_or_path=str(folder / "model"))
    (model,) = Scorer(load_models([str(folder / "model")], config), config).models
    assert not any(module.training for module in model.modules())
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "command_line",
    [
        "score_variance.py --lengths 8 --num_samples 2 --rows 20 --min_draws 5 --gradient_draws 2",
        "loss_bias.py --num_samples 2 --draws 8",
    ],
)
def test_benchmarks_of_scores_run(folder, tmp_path, command_line):
    name, *flags = command_line.split()
    output = tmp_path / "out.json"
    flags += ["--model_name_or_path", str(folder / "model"), "--ref_model_name_or_path", str(folder / "other")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *flags, "--pairs", "2", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["lines"]


def test_in_4_bits(folder, capsys):
    pytest.importorskip("bitsandbytes")
    whole = lines(capsys, folder, "--score_estimator", "exact")
    four = lines(capsys, folder, "--score_estimator", "exact", "--load_in_4bit")
    pairs = [(a["chosen"]["score"], b["chosen"]["score"]) for a, b in zip(whole, four, strict=True)]
    assert all(0 < abs(a - b) < 0.1 * abs(a) for a, b in pairs)


def test_auto_is_settled_before_it_is_recorded(folder, tmp_path, capsys):
    lines(capsys, folder, "--num_mc_samples", "2", "--output", str(tmp_path / "out.jsonl"))
    assert "float32" in "".join(path.read_text() for path in tmp_path.iterdir())
