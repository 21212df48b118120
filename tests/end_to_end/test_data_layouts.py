"""What a run says of its data before it trains: layouts, templates, and what is likely a mistake."""

import json
import shutil
import sys
from pathlib import Path

import pytest

TRAIN = [sys.executable, "launch/train.py", "--tracking_uri", "none", "--max_steps", "1", "--num_mc_samples", "2"]
TRAIN += ["--max_prompt_length", "60", "--per_device_train_batch_size", "2", "--eval_fraction", "0"]


@pytest.fixture
def run(command, tiny_model, tmp_path):
    """``run(rows, flags)``: training on such rows, in a folder of its own."""

    def run(rows: list[dict], *flags: str, model: Path = tiny_model, **options):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        given = [str(flag).replace("ROWS", str(data)) for flag in flags]
        length = [] if "--max_length" in given else ["--max_length", "120"]
        return command([*TRAIN, "--model_name_or_path", str(model), "--train_data", str(data), *given, *length,
                        "--output_dir", str(out)])  # fmt: skip

    return run


def pairs(**names: str) -> list[dict]:
    asked, good, bad = (names.get(name, name) for name in ("prompt", "chosen", "rejected"))
    return [{asked: f"What is {n} plus 1?", good: f"It is {n + 1}.", bad: f"It is {n}."} for n in range(6)]


def refused(done) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_any_layout_can_be_mapped(run):
    rows = pairs(prompt="ask", chosen="good", rejected="bad")
    assert "--columns" in refused(run(rows))
    done = run(rows, "--columns", "prompt=ask,chosen=good,rejected=bad")
    assert done.returncode == 0, done.stderr
    assert "'ask', 'good', 'bad'" in refused(run(rows, "--columns", "prompt=question,chosen=good,rejected=bad"))
    assert "give pairs such as" in refused(run(rows, "--columns", "question"))


@pytest.mark.slow
def test_what_is_likely_a_mistake_is_told_before_training(run):
    good = [{"prompt": f"Say {n}", "completion": str(n), "label": True} for n in range(6)]
    assert "all 6 answers are desirable" in run(good, "--loss_type", "apo_zero_unpaired").stdout
    one = [{"prompt": "Say a number", "completion": str(n), "label": n > 2} for n in range(6)]
    assert "all records answer one prompt" in run(one, "--loss_type", "apo_zero_unpaired").stdout
    told = run(pairs(), "--eval_data", "ROWS", "--num_eval_problems", "0").stdout
    assert "--eval_data: 6 of its 6 records, and the prompts of 6, are trained on" in told
    long = [row | {"chosen": "very " * 2000} for row in pairs()]
    assert "the model was made for" in run(long, "--max_length", "9000").stdout
    assert "warning" not in run(pairs(), "--warmup_steps", "0").stdout


def changed(model: Path, folder: Path, template: str | None = None) -> Path:
    """The model with another template, or with a tokenizer in which two tokens have changed places."""
    shutil.copytree(model, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        return folder
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = (next(token for token, number in vocabulary.items() if number == wanted) for wanted in (40, 41))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    return folder


def test_a_reference_that_reads_other_tokens_is_refused(run, tiny_model, tmp_path):
    other = changed(tiny_model, tmp_path / "other")
    assert "has another tokenizer than the policy: 2 tokens" in refused(run(pairs(), "--ref_model_name_or_path", other))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "cannot be used"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "lists of parts"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_training(run, tiny_model, tmp_path, template, said):
    model = changed(tiny_model, tmp_path / "changed", template)
    assert said in refused(run([row | {"system": "Be brief."} for row in pairs()], model=model))
