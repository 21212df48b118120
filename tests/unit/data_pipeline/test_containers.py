"""The same rows give the same tokens, whatever holds them."""

import csv
import json
import os
import sys

import pytest

from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.records import assistant_turn, user_turn
from data_pipeline.shards import write_shard
from data_pipeline.stages import RecordReader


def whole(*said):
    return [*user_turn("Add 1 and 2."), *assistant_turn("3"), *user_turn("And 1 more."), *assistant_turn(said[0])]


LAYOUTS = {
    "strings": [
        {"prompt": "q1", "chosen": "a", "rejected": "b"},
        {"prompt": "q2", "chosen": "[1, 2]", "rejected": "c"},
    ],
    "ultrafeedback": [
        {"prompt": "Add 1 and 2.", "chosen": whole("4"), "rejected": whole("5"), "score_chosen": 9.0},
        {"prompt": "Add 1 and 2.", "chosen": whole("6"), "rejected": whole("7"), "score_chosen": 9.5},
    ],
    "implicit": [{"chosen": whole("4"), "rejected": whole("5")}],
    "hh": [{"chosen": "\n\nHuman: q\n\nAssistant: I am", "rejected": "\n\nHuman: q\n\nAssistant: I was"}],
    "orca": [{"system": "S", "question": "q", "chosen": "The a", "rejected": "The b"}],
    "alpaca": [{"instruction": "Add.", "input": "1 and 2", "output": "3"}],
    "kto": [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
    "graded": [
        {"question": "q", "answer": "right", "is_correct": True},
        {"question": "q", "answer": "wrong", "is_correct": False},
        {"question": "p", "answer": "right", "is_correct": True},
    ],
    "candidates": [{"question": "q", "candidates": ["a", "b", "c", "d"], "correct": [True, False, True, False]}],
    "users_turn_last": [
        {"chosen": [*whole("4"), *user_turn("thanks")], "rejected": [*whole("5"), *user_turn("bye")]},
        {"chosen": whole("4"), "rejected": whole("5")},
    ],
    "history": [{"history": [["hi", "hello"]], "query": "q", "chosen": "a", "rejected": "b"}],
    "thoughts": [
        {
            "prompt": [*user_turn("q")],
            "chosen": [{"role": "assistant", "content": "5", "thinking": "2+3"}],
            "rejected": [{"role": "assistant", "content": "6", "thinking": "2+4"}],
        }
    ],
}


def cell(value, printed):
    return value if isinstance(value, str) else repr(value) if printed else json.dumps(value)


def write_table(path, rows, printed):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([cell(row[name], printed) for name in names] for row in rows)


def containers(folder, rows):
    """The rows in each of the containers that are read."""
    import datasets
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(rows))
    write_table(folder / "rows.csv", rows, False)
    write_table(folder / "printed.csv", rows, True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    write_shard(folder / "rows.tar", [(f"{i:03d}", json.dumps(row).encode()) for i, row in enumerate(rows)])
    url = f"memory://{folder}/rows.jsonl"
    with fsspec.open(url, "w") as file:
        file.write(lines)
    names = ("rows.jsonl", "rows.json", "rows.csv", "printed.csv", "rows.parquet", "saved", "rows.tar")
    return [*(str(folder / name) for name in names), url]


def tokens(source, cache, encoder):
    dataset = open_dataset(source, cache_dir=cache)
    records = [RecordReader(dataset)(number) for number in range(len(dataset))]
    encoded = [encoder(record) for record in records]
    sides = [[side if side is None else side.ids.tolist() for side in (one.chosen, one.rejected)] for one in encoded]
    return sides, [(record.id, record.prompt, record.template_kwargs) for record in records]


THINKING = (
    "{% for m in messages %}<head>{{ m.role }}</head>{% if m.thinking %}({{ m.thinking }}) {% endif %}{{ m.content }}"
    "<eot>{% endfor %}{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_rows_same_tokens(layout, tmp_path, cache, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    encoder = Encoder(tokenizer, template="chat")
    first, *others = containers(tmp_path, LAYOUTS[layout])
    expected = tokens(first, cache, encoder)
    assert expected[0]
    for source in others:
        assert tokens(source, cache, encoder) == expected, source


def test_columns_are_mapped_in_every_container(tmp_path, cache, tokenizer):
    rows = [{"ask": f"q{i}", "good": f"a{i}", "bad": "b"} for i in range(3)]
    found = []
    for source in containers(tmp_path, rows):
        with pytest.raises(DataError, match=r"missing field|no usable record"):
            open_dataset(source, cache_dir=cache)
        dataset = open_dataset(source, cache_dir=cache, columns="prompt=ask,chosen=good,rejected=bad")
        found.append([RecordReader(dataset)(number).id for number in range(3)])
    assert found == found[:1] * len(found)


def test_rows_of_several_layouts_in_one_file_are_each_read_by_their_own(tmp_path, cache, jsonl):
    rows = [row for layout in ("strings", "ultrafeedback", "hh", "orca", "history") for row in LAYOUTS[layout]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [dict.fromkeys(names) | row for row in rows]  # as the library `datasets` joins them
    mixed = {}
    for name, some in (("plain", rows), ("filled", filled)):
        dataset = open_dataset(str(jsonl(tmp_path / f"{name}.jsonl", some)), cache_dir=cache)
        mixed[name] = [RecordReader(dataset)(number) for number in range(len(dataset))]
    assert [record.id for record in mixed["plain"]] == [record.id for record in mixed["filled"]]
    assert len(mixed["plain"]) == len(rows)
    bad = jsonl(tmp_path / "bad.jsonl", [*rows, {"title": "t", "chosen": "The a", "rejected": "The b"}])
    with pytest.raises(DataError, match=rf"bad\.jsonl:{len(rows) + 1}: no column is known to hold the prompt"):
        open_dataset(str(bad), cache_dir=cache)


def test_unread_columns_are_told_once_by_name_and_count(tmp_path, cache, caplog):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "rating": i, "by": "x"} for i in range(4)]
    for source in containers(tmp_path, rows):
        caplog.clear()
        open_dataset(source, cache_dir=cache)
        told = [record.message for record in caplog.records if "not read" in record.message]
        assert len(told) == 1 and told[0].endswith("columns not read: 'by' (4), 'rating' (4)"), source


def test_a_file_that_was_changed_is_read_anew_whatever_its_size_and_time(tmp_path, cache, jsonl):
    path = tmp_path / "rows.jsonl"
    for chosen, rejected in (("aaa", "bbb"), ("bbb", "aaa")):
        jsonl(path, [{"prompt": "q", "chosen": chosen, "rejected": rejected}])
        os.utime(path, (1, 1))
        dataset = open_dataset(str(path), cache_dir=cache)
        assert RecordReader(dataset)(0).chosen == chosen
        write_shard(tmp_path / "rows.tar", [("0", path.read_bytes())])
        os.utime(tmp_path / "rows.tar", (1, 1))
        assert RecordReader(open_dataset(str(tmp_path / "rows.tar"), cache_dir=cache))(0).chosen == chosen


def test_a_file_with_a_new_time_and_the_old_content_is_not_built_again(tmp_path, cache, jsonl, make_rows):
    path = jsonl(tmp_path / "rows.jsonl", make_rows(3))
    open_dataset(str(path), cache_dir=cache)
    os.utime(path, (1, 1))
    open_dataset(str(path), cache_dir=cache)
    assert len(list((cache / "built").glob("rows-*[0-9a-f]"))) == 1


def test_a_digest_is_kept_only_of_files_that_have_settled(tmp_path, cache, monkeypatch):
    from data_pipeline import identity

    path = tmp_path / "a"
    path.write_text("one")
    first = identity.content_digest(path, cache)
    assert not (cache / "digests").exists(), "written a moment ago: it may change again within the clock's tick"
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -1.0)
    assert identity.content_digest(path, cache) == first
    (kept,) = (cache / "digests").iterdir()
    monkeypatch.setattr(identity, "_read_through", lambda path: pytest.fail("read again"))
    assert identity.content_digest(path, cache) == first == kept.read_text()


def test_a_folder_with_somebodys_dataset_info_is_a_folder_of_files(tmp_path, cache, jsonl, make_rows):
    """LlamaFactory's data folder has such a file; a folder saved by the library `datasets` has a state.json too."""
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "pairs.jsonl", make_rows(3))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.jsonl"}}))
    assert len(open_dataset(str(tmp_path / "data"), cache_dir=cache)) == 3


def test_no_code_of_a_tokenizer_is_run(tmp_path, capsys, jsonl, make_rows, monkeypatch):
    from data_pipeline.__main__ import main
    from data_pipeline.cli import exit_code

    folder = tmp_path / "model"
    folder.mkdir()
    mark = tmp_path / "was_run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}))
    monkeypatch.setattr(sys, "stdin", None)  # a question would fail
    source = str(jsonl(tmp_path / "a.jsonl", make_rows(2)))
    for command in (["inspect", source], ["stats", source], ["build", source, "--out", str(tmp_path / "out")]):
        assert exit_code(main, [*command, "--tokenizer", str(folder)]) == 2
        printed = capsys.readouterr().err
        assert "cannot be loaded" in printed and len(printed.splitlines()) == 1
    assert not mark.exists()
