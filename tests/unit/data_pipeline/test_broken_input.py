"""What users have that is broken: one line and exit code 2, nothing learned from what is no text, the rest kept."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import zlib

import pytest

from data_pipeline.__main__ import main
from data_pipeline.cli import exit_code
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.records import RecordError
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.sources.formats import convert

MESSAGES = [{"role": "user", "content": "2 + 3?"}]


def records_of(folder, row_count):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provenance"]["report"]["rows"] == row_count
    return manifest["num_records"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "a": {"solution": None, "is_correct": False}, "b": {"solution": "5", "is_correct": True}},
        {"question": "q", "candidates": [None, "5"], "correct": [False, True]},
        {"question": "q", "candidates": [{"text": 6, "correct": False}, {"text": "5", "correct": True}]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": MESSAGES},
        {"id": "\ud83d", "prompt": "p", "chosen": "a", "rejected": "b"},
    ],
)
def test_what_is_no_text_is_refused_and_never_written_out_as_text(row):
    with pytest.raises(RecordError):
        list(convert(row))


def test_candidates_of_a_conversation_keep_its_turns():
    (record,) = convert({"prompt": MESSAGES, "candidates": ["5", "6"], "correct": [True, False]})
    assert record.prompt == tuple(MESSAGES)
    assert record.chosen == ({"role": "assistant", "content": "5"},)


def test_a_bad_row_among_answers_of_one_row_each_costs_itself_only(tmp_path, jsonl):
    rows = [{"question": q, "answer": a, "is_correct": a == "5"} for q in ("x", "y") for a in ("5", "6")]
    source = jsonl(tmp_path / "long.jsonl", [rows[0], {"question": "x", "is_correct": True}, *rows[1:]])
    with pytest.raises(DataError, match=r"long\.jsonl:2: missing field 'answer'"):
        build([str(source)], tmp_path / "raised", BuildOptions())
    build([str(source)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert records_of(tmp_path / "out", row_count=3) == 2  # two questions and the bad row


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_csv_gz_is_one_line_or_skipped(tmp_path, damage):
    table = "prompt,chosen,rejected\n" + "".join(f"p{i},a{zlib.crc32(b'%d' % i)},b{i * 31}\n" for i in range(5000))
    data = bytearray(gzip.compress(table.encode()))
    half = len(data) // 2
    data[half:] = b"" if damage == "cut" else b"\xff" * half
    path = tmp_path / "t.csv.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match="cut or damaged"):
        build([str(path)], tmp_path / "raised", BuildOptions())
    build([str(path)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert 0 < json.loads((tmp_path / "out/manifest.json").read_text())["num_records"] < 5000


@pytest.mark.parametrize("content", ["{", '{"schema": 1}', "[]"])
def test_a_broken_manifest_is_one_line(tmp_path, jsonl, make_rows, content, capsys):
    source, out = str(jsonl(tmp_path / "a.jsonl", make_rows(5))), tmp_path / "out"
    command = ["build", source, "--out", str(out), "--workers", "0"]
    assert exit_code(main, command) == 0
    (out / "manifest.json").write_text(content)
    capsys.readouterr()
    for argv in (command, ["inspect", str(out)]):
        assert exit_code(main, argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert exit_code(main, ["verify", str(out)]) == 1
    assert "damaged_index" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["train", "eval"])
def test_a_built_folder_that_lost_a_shard_is_not_called_done(tmp_path, jsonl, make_rows, side):
    source, options = str(jsonl(tmp_path / "a.jsonl", make_rows(20))), BuildOptions(shard_size=5, eval_fraction=0.3)
    manifest = build([source], tmp_path / "out", options)
    assert build([source], tmp_path / "out", options) == manifest
    (tmp_path / "out" / side / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar is missing or cut"):
        build([source], tmp_path / "out", options)


def test_a_file_name_that_is_no_unicode_can_be_built_and_opened(tmp_path, jsonl, make_rows):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.jsonl")
    os.replace(jsonl(tmp_path / "a.jsonl", make_rows(5)), source)
    build([source], tmp_path / "out", BuildOptions())
    assert len(open_dataset(str(tmp_path / "out"))) == 5
    assert len(open_dataset(source, cache_dir=tmp_path / "cache")) == 5


def test_deeply_nested_json_is_one_line(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="invalid JSON"):
        build([str(tmp_path / "deep.json")], tmp_path / "out", BuildOptions())


@pytest.mark.parametrize(
    "argv",
    [
        ["build", "", "--out", "OUT"],
        ["build", "http://127.0.0.1:9/folder", "--out", "OUT"],
        ["generate", "--nope"],
        ["generate", "--count", "2", "--out", "/proc/no/such/a.jsonl"],
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, tmp_path, capsys):
    try:
        code = exit_code(main, [str(tmp_path / "out") if part == "OUT" else part for part in argv])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_records_are_shown_on_a_terminal_of_any_encoding(tmp_path, jsonl):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "日本", "chosen": "é", "rejected": "ü"}])
    command = [sys.executable, "-m", "data_pipeline", "inspect", str(source), "--cache_dir", str(tmp_path / "cache")]
    shown = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and r"\u65e5" in shown.stdout


@pytest.mark.parametrize("name", ["what? now", "a [b]", "a{b,c}", "it's $HOME", "50% *"])
def test_folders_with_odd_names_are_themselves(tmp_path, jsonl, make_rows, cache, name):
    """Never patterns; and the command that a message names can be pasted into a shell."""
    folder = tmp_path / name
    folder.mkdir()
    source = jsonl(folder / "p 8.jsonl", make_rows(6))
    for named in (source, folder, folder / "*.jsonl", folder / "{p 8,p 8}.jsonl"):
        assert len(open_dataset(str(named), cache_dir=cache)) == 6
    build([str(source)], folder / "out", BuildOptions(shard_size=3))
    for named in (folder / "out", folder / "out" / "*.tar", folder / "out" / "shard-0000{0..1}.tar"):
        assert len(open_dataset(str(named), cache_dir=cache)) == 6
    (folder / "out" / "shard-00001.tar").unlink()
    with pytest.raises(DataError) as error:
        open_dataset(str(folder / "out"), cache_dir=cache)
    (command,) = re.findall("`(.*)`", str(error.value))
    assert shlex.split(command)[-1] == str(folder / "out")
