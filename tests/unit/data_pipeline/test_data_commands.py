"""The commands: what they print, and one line with exit code 2 for whatever a user gets wrong."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from data_pipeline.__main__ import _parser as parser
from data_pipeline.__main__ import main
from data_pipeline.cli import exit_code
from data_pipeline.commands.common import encoder_of
from data_pipeline.records import PreferenceRecord, assistant_turn, user_turn
from diffdpo.config import TrainConfig, make_config
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_tokenizer_and_spec


@pytest.fixture
def source(tmp_path, jsonl, make_rows):
    return str(jsonl(tmp_path / "pairs.jsonl", make_rows(30)))


@pytest.fixture
def tokenizer_folder(tmp_path, chat_tokenizer):
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_build(source, tmp_path, capsys, tokenizer_folder):
    out = tmp_path / "out"
    as_it_is = ("--tokenizer", tokenizer_folder, "--template", "auto")
    options = ("--shard_size", 8, "--shuffle_seed", 1, "--eval_fraction", 0.2, "--workers", 0)
    assert run("build", source, "--out", out, *options, *as_it_is, "--max_length", 28) == 0
    printed = capsys.readouterr().out
    assert "train: 24 records in 3 shards" in printed
    assert "eval: 6 records in 1 shards" in printed
    tokens = json.loads((out / "train" / "manifest.json").read_text())["tokens"]
    assert tokens["prompt"]["max"] == len("question 29 ")
    assert 0 < tokens["truncation"]["kept_whole"] < 24


def test_file_urls_are_taken_by_every_command(source, tmp_path, cache, capsys):
    out = tmp_path / "out"
    assert run("build", f"file://{source}", "--out", out, "--workers", 0) == 0
    assert "out: 30 records in 1 shards" in capsys.readouterr().out
    for command in ("inspect", "stats", "verify"):
        assert run(command, f"file://{out}", "--cache_dir", cache) == 0
    shard = out / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    assert run("verify", f"file://{out}", "--cache_dir", cache) == 1
    assert run("build", f"file://{source}", "--out", tmp_path / "sides", "--workers", 0, "--eval_fraction", 0.2) == 0
    capsys.readouterr()
    assert run("verify", f"file://{tmp_path / 'sides'}", "--cache_dir", cache) == 0
    assert "2 shards, 30 indexed records" in capsys.readouterr().out


def test_inspect_shows_the_boundaries(source, capsys, tokenizer_folder, cache):
    as_it_is = ("--tokenizer", tokenizer_folder, "--template", "auto")
    assert run("inspect", source, "--cache_dir", cache, "--id", "r7", *as_it_is) == 0
    printed = capsys.readouterr().out
    assert "-- prompt\nquestion 7 \n-- chosen\ngood 7 aaaaaaa\n-- rejected\nbad 7 " in printed
    assert "PROMPT 11 |q|u|e|s|t|i|o|n| |7| | ANSWER 14 |g|o|o|d| |7| |a|a|a|a|a|a|a| TERMINATOR <eos>" in printed
    short = ("--max_length", 14, "--max_prompt_length", 3)
    assert run("inspect", source, "--cache_dir", cache, "--id", "r7", *as_it_is, *short) == 0
    assert "PROMPT 3 | |7| | ANSWER 11 |g|o|o|d| |7| |a|a|a|a| CUT, no terminator" in capsys.readouterr().out


def test_inspect_filters_and_samples(source, capsys, cache):
    assert run("inspect", source, "--cache_dir", cache, "--filter", "question 2[0-3] ", "--count", 9) == 0
    printed = capsys.readouterr().out
    assert [f"id r{i}" in printed for i in (19, 20, 23, 24)] == [False, True, True, False]
    shown = []
    for seed in (1, 1, 2):
        run("inspect", source, "--cache_dir", cache, "--sample_seed", seed)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    assert run("inspect", source, "--cache_dir", cache, "--id", "none") == 1


def test_inspect_messages_and_labels(tmp_path, jsonl, capsys, cache):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    rows.append({"prompt": "q", "completion": "a", "label": False})
    run("inspect", jsonl(tmp_path / "a.jsonl", rows), "--cache_dir", cache)
    printed = capsys.readouterr().out
    assert "[user] hi\n-- answer (desirable)\n[assistant] yo" in printed
    assert "-- answer (undesirable)\na" in printed


def test_stats(source, tmp_path, capsys, cache, tokenizer_folder):
    plot, report = tmp_path / "plots" / "s.png", tmp_path / "s.json"
    as_it_is = ("--tokenizer", tokenizer_folder, "--template", "auto")
    options = (*as_it_is, "--max_length", 28, "--plot", plot, "--json", report)
    assert run("stats", source, "--cache_dir", cache, *options) == 0
    printed = capsys.readouterr().out
    assert "records: 30" in printed
    assert "source pairs: 30 (100.0%)" in printed
    figures = json.loads(report.read_text())
    cut = figures["tokens"]["truncation"]
    assert cut["kept_whole"] + max(cut["chosen_cut"], cut["rejected_cut"]) == 30
    assert figures["bytes"]["prompt"]["max"] == 12
    assert figures["duplicate_records"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_stats_of_unpaired_and_mixed(tmp_path, jsonl, source, cache, capsys):
    rows = [{"prompt": "q", "completion": f"a{i}", "label": i > 2} for i in range(5)]
    assert run("stats", jsonl(tmp_path / "kto.jsonl", rows), source, "--cache_dir", cache) == 0
    printed = capsys.readouterr().out
    assert "pairs: 30\nunpaired: 5\nprompts: 31" in printed
    assert "source kto: 5 (14.3%)" in printed


@pytest.fixture
def models(tmp_path):
    """{name: folder}: the bundled model, one with a chat template, one whose config names another terminator."""

    def change(name, file, **fields):
        folder = tmp_path / name
        shutil.copytree(BUNDLED_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
        return folder

    template = "{% for m in messages %}<{{m['role']}}>{{m['content']}}{% endfor %}<assistant>"
    chat = change("chat", "tokenizer_config.json", chat_template=template)
    return {"bundled": BUNDLED_MODEL, "chat": chat, "end": change("end", "config.json", eos_token_id=[0, 1])}


@pytest.mark.parametrize("name", ["bundled", "chat", "end"])
@pytest.mark.parametrize("flags", [{}, {"template": "plain", "max_length": 600, "truncation": "keep_start"}])
def test_the_commands_show_what_training_sees(models, name, flags):
    tokenizer, spec = load_tokenizer_and_spec(str(models[name]))
    trained = make_encoder(make_config(TrainConfig, flags), tokenizer, spec)
    given = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    shown = encoder_of(parser().parse_args(["stats", "x", "--tokenizer", str(models[name]), *given]))
    for record in (
        PreferenceRecord("a", "What is 2 + 3?", "5", "6"),
        PreferenceRecord("b", user_turn("What is 2 + 3?"), assistant_turn("5"), assistant_turn("6")),
        PreferenceRecord("c", "word " * 900, "right " * 300, "wrong"),
    ):
        for side in ("chosen", "rejected"):
            seen, expected = (getattr(encoder(record), side) for encoder in (shown, trained))
            assert seen.ids.tolist() == expected.ids.tolist()
            assert seen.prompt_length == expected.prompt_length
    assert (shown.forbidden_ids, shown.terminator) == (trained.forbidden_ids, trained.terminator)


def test_the_terminator_may_be_named(source, capsys, tokenizer_folder, cache):
    assert run("inspect", source, "--cache_dir", cache, "--tokenizer", tokenizer_folder, "--terminator", "<eot>") == 0
    assert "TERMINATOR <eot>" in capsys.readouterr().out


WRONG = [
    (["build"], "--out"),
    (["build", "SOURCE"], "--out"),
    (["build", "nowhere.jsonl", "--out", "OUT"], "does not exist"),
    (["build", "SOURCE", "--out", "OUT", "--shard_size", "0"], "shard_size is 0"),
    (["build", "SOURCE", "--out", "OUT", "--shard_size", "x"], "invalid int value"),
    (["build", "SOURCE", "--out", "OUT", "--eval_fraction", "1"], "eval_fraction is 1.0"),
    (["build", "SOURCE", "--out", "OUT", "--shuffle_seed", "-1"], "shuffle_seed"),
    (["build", "SOURCE", "--out", "OUT", "--format", "kto"], "invalid choice: 'kto'"),
    (["build", "SOURCE", "--out", "OUT", "--max_pairs", "-1"], "max_pairs"),
    (["build", "SOURCE", "--out", "OUT", "--workers", "-1"], "--workers"),
    (["build", "SOURCE", "--out", "OUT", "--tokenizer", "./none"], "cannot be loaded"),
    (["build", "SOURCE", "--out", "OUT", "--shard", "3"], "there is no --shard"),
    (["build", "SOURCE", "--out", "TMP"], "exists and was not built"),
    (["build", "SOURCE", "--out", "OUT", "--format", "hh"], "no usable record in 30 rows"),
    (["inspect", "SOURCE", "--count", "0"], "--count is 0"),
    (["inspect", "SOURCE", "--filter", "("], "not a regular expression"),
    (["inspect", "SOURCE", "--sample_seed", "-2"], "--sample_seed is -2"),
    (["inspect", "SOURCE", "--side", "eval"], "not split"),
    (["stats", "SOURCE", "--plot", "x.jpg"], "must end in .png"),
    (["stats", "nowhere.jsonl", "--plot", "/proc/none/x.png"], "/proc/none/x.png cannot be written"),  # said first
    (["stats", "nowhere.jsonl", "--json", ""], "'.' is a folder"),
    (["verify", "nowhere", "--json", "/proc/none/x.json"], "/proc/none/x.json cannot be written"),
    (["build", "SOURCE", "--out", ""], "a name of its own"),
    (["build", "ONE", "--out", "OUT", "--eval_fraction", "0.1"], "a single prompt .* set it to 0"),
    (["stats", "SOURCE", "--tokenizer", "TOKENIZER", "--max_length", "1"], "max_length is 1"),
    (["stats", "SOURCE", "--tokenizer", "TOKENIZER", "--max_prompt_length", "5000"], "max_prompt_length is 5000"),
    (["stats", "SOURCE", "--max_length", "5", "--truncation", "drop"], "--max_length and --truncation .* --tokenizer"),
    (["build", "SOURCE", "--out", "OUT", "--max_length", "5"], "--max_length count tokens; add --tokenizer"),
    (["stats", "SOURCE", "--tokenizer", "TOKENIZER", "--terminator", "<none>"], "'<none>' is no token"),
    (["verify", "TMP"], "no data file|is not"),
    (["verify", "SOURCE"], "shards"),
    (["look", "SOURCE"], "invalid choice: 'look'"),
    ([], "COMMAND"),
    (["generate", "--count", "0"], "--count 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments, message, source, tmp_path, tokenizer_folder, cache, capsys, monkeypatch
):
    monkeypatch.setenv("DIFFDPO_CACHE", str(cache))
    empty = tmp_path / "folder"
    empty.mkdir()
    (tmp_path / "one.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    names = {
        "ONE": str(tmp_path / "one.jsonl"),
        "SOURCE": source,
        "OUT": str(tmp_path / "out"),
        "TMP": str(empty),
        "TOKENIZER": tokenizer_folder,
    }
    try:
        code = exit_code(main, [names.get(argument, argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    stderr = capsys.readouterr().err
    last = [line for line in stderr.splitlines() if "error: " in line]
    assert code == 2, stderr
    assert len(last) == 1 and "Traceback" not in stderr
    assert re.search(message, last[0]), last[0]
    assert not (tmp_path / "out").exists()


def test_help_and_imports_are_light():
    script = (
        "import sys, data_pipeline, data_pipeline.errors, data_pipeline.__main__\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'webdataset', 'diffdpo'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    helped = subprocess.run(
        [sys.executable, "-m", "data_pipeline", "--help"], check=True, timeout=60, capture_output=True, text=True
    )
    assert all(word in helped.stdout for word in ("build", "inspect", "stats", "verify", "generate"))


def test_interrupts_and_full_disks(capsys):
    def raising(error):
        def fail(_):
            raise error

        return fail

    assert exit_code(raising(KeyboardInterrupt()), []) == 130
    assert exit_code(raising(OSError(28, "No space left on device", "/x")), []) == 2
    assert "No space left on device: '/x'" in capsys.readouterr().err
