"""Every file type gives the same rows; what cannot be read is said in one line with its place."""

import csv
import gzip
import json

import pytest

from data_pipeline import shard_builder as build_module
from data_pipeline.commands.stats import source_mix
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.locate import check_rows
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.shards import write_shard
from data_pipeline.sources.columns import Fields
from data_pipeline.sources.files import SourceOptions, open_rows
from data_pipeline.stages import RecordReader


def records(source, cache, **options):
    dataset = open_dataset(str(source), cache_dir=cache, **options)
    reader = RecordReader(dataset)
    return [(r.id, r.prompt, r.chosen, r.rejected) for r in map(reader, range(len(dataset)))]


def conversational(rows):
    return [
        {
            "id": row["id"],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]


def write_jsonl_gz(folder, rows):
    path = folder / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_json(folder, rows):
    path = folder / "x.json"
    path.write_text(json.dumps(rows))
    return path


def write_json_object(folder, rows):
    path = folder / "x.json"
    path.write_text(json.dumps({"version": 1, "data": rows}))
    return path


def write_lines_named_json(folder, rows):
    path = folder / "x.json"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    return path


def write_csv(folder, rows):
    path = folder / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        writer.writerows(cells)
    return path


def write_parquet(folder, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    return folder / "x.parquet"


def write_saved_dataset(folder, rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder, rows):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=data, test=data.select(range(2))).save_to_disk(folder / "saved")
    return folder / "saved"


def write_folder(folder, rows):
    made = folder / "many"
    made.mkdir()
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (made / "b.json").write_text(json.dumps(rows[5:]))
    (made / "README.md").write_text("words")
    return made


WRITERS = [
    write_jsonl_gz,
    write_json,
    write_json_object,
    write_lines_named_json,
    write_csv,
    write_parquet,
    write_saved_dataset,
    write_saved_splits,
    write_folder,
]


@pytest.mark.parametrize("shape", [list, conversational])
@pytest.mark.parametrize("write", WRITERS)
def test_every_file_type(tmp_path, make_rows, jsonl, cache, write, shape):
    rows = shape(make_rows(12))
    expected = records(jsonl(tmp_path / "plain.jsonl", rows), cache)
    assert len(expected) == 12
    assert records(write(tmp_path, rows), cache) == expected


def test_files_of_a_folder_are_told_apart(tmp_path, make_rows, cache):
    write_folder(tmp_path, make_rows(12))
    dataset = open_dataset(str(tmp_path / "many"), cache_dir=cache)
    assert source_mix(dataset) == {"b": 7, "a": 5}


def test_a_glob_of_files(tmp_path, make_rows, jsonl, cache):
    jsonl(tmp_path / "a.jsonl", make_rows(3))
    jsonl(tmp_path / "b.jsonl", make_rows(3, start=3))
    assert [r[0] for r in records(tmp_path / "*.jsonl", cache)] == [f"r{i}" for i in range(6)]
    assert len(records(tmp_path / "*.jsonl", cache, max_records=4)) == 4


def test_names_of_shards_and_files(tmp_path, make_rows, jsonl, cache, monkeypatch):
    """Globs, brace lists, relative names and file:// lead to the same records; a built index is used."""
    sources = [str(jsonl(tmp_path / f"part-{i}.jsonl", make_rows(10, start=10 * i))) for i in range(3)]
    build(sources, tmp_path / "built", BuildOptions(shard_size=10))
    monkeypatch.chdir(tmp_path)
    expected = records("built", cache)
    assert len(expected) == 30
    for name in ("part-{0..2}.jsonl", "part-*.jsonl", f"file://{tmp_path}/part-?.jsonl"):
        assert records(name, cache) == expected
    assert not (cache / "index").exists()
    for name in ("built/*.tar", "built/*", "built/shard-{00000..00002}.tar", f"{tmp_path}/built/*.tar"):
        assert records(name, cache) == expected
    assert not (cache / "index").exists(), "the index of the folder serves"
    assert len(records("built/shard-0000[01].tar", cache)) == 20
    assert len(records("built/shard-00001.tar", cache)) == 10


def test_another_split_of_a_saved_dataset(tmp_path, make_rows):
    saved = write_saved_splits(tmp_path, make_rows(5))
    assert len(list(open_rows(str(saved), SourceOptions(split="test")))) == 2
    assert len(list(open_rows(f"{saved}:test", SourceOptions()))) == 2
    with pytest.raises(DataError, match="no split 'dev'; allowed: train, test"):
        list(open_rows(f"{saved}:dev", SourceOptions()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"prompt,chosen,rejected\nq,a\n", "x.csv:2: missing field 'rejected'"),
        ("x.csv", b"prompt,chosen\nq,a,b\n", "x.csv:2: more cells"),
        ("x.csv", b"prompt,chosen,rejected\nq,\xe9,b\n", "save the table as UTF-8"),
        ("x.json", b"{", "x.json: invalid JSON"),
        ("x.json", b"[3]", "x.json, item 1: an object is needed"),
        ("x.json", b"3", "a list of objects is needed"),
        ("x.parquet", b"PAR1", "x.parquet: not a readable parquet file"),
        ("x.csv", b"prompt,chosen,rejected,chosen\nq,a,b,c\n", "the column 'chosen' stands twice"),
        ("x.csv", b"prompt,completion,label\nq,a,\n", "'label' is empty"),
        (
            "x.jsonl",
            b'{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}',
            "the name 'chosen' stands twice",
        ),
        (
            "x.json",
            b'[{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}]',
            "the name 'chosen' stands twice",
        ),
        ("x.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'.encode("utf-16"), "save it as UTF-8"),
        ("x.txt", b"words", "files ending in '.txt' are not read; allowed: .csv"),
        ("x.jsonl", b"", "has no rows"),
        ("x.jsonl.gz", b"words", "the file is not compressed; take .gz off its name"),
        ("x.jsonl.gz", b"\x1f\x8bwords", "x.jsonl.gz: after line 0"),
    ],
)
def test_unreadable_files(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        open_dataset(str(tmp_path / name), cache_dir=cache)


def test_a_cut_gzip(tmp_path, make_rows, cache):
    path = write_jsonl_gz(tmp_path, [row | {"chosen": str(i * 7919**5)} for i, row in enumerate(make_rows(3000))])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: after line \d+: .*cut or damaged.*--on_error skip"):
        open_dataset(str(path), cache_dir=cache)
    manifest = build([str(path)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert 100 < manifest["num_records"] < 3000
    assert manifest["provenance"]["report"]["dropped"]["torn_file"]["count"] == 1


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "/nowhere/at/all", "./x", "a/b/c/d", "no*where.tar", "x-{0..2}.tar", ""]
)
def test_sources_that_do_not_exist(cache, source):
    with pytest.raises(DataError, match=r"does not exist|matches no|no data source"):
        open_dataset(source, cache_dir=cache)


@pytest.fixture
def hub_says(monkeypatch):
    """Make the hub answer the question whether it has a data set: raise an error, or nothing."""
    hub = pytest.importorskip("huggingface_hub")

    def answer(error: Exception | None = None):
        def dataset_info(*_, **__):
            if error is not None:
                raise error

        monkeypatch.setattr(hub.HfApi, "dataset_info", dataset_info)

    return answer


def test_a_data_set_that_cannot_be_loaded_is_one_line(cache, monkeypatch, hub_says):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no\nroute")

    hub_says()
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'some/name' is no file or folder here.*no route"):
        open_dataset("some/name", cache_dir=cache)


def test_a_name_the_hub_does_not_have_is_not_loaded(cache, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for"))
    with pytest.raises(DataError, match=r"'some name' is no file or folder here.*no data set of this name"):
        open_dataset("some name", cache_dir=cache)  # which cannot be a name there, so nobody is asked


def test_without_the_hub_only_what_is_kept_here_is_looked_into(cache, monkeypatch, hub_says):
    datasets = pytest.importorskip("datasets")
    hub_says(ConnectionError("no network"))
    seen = []

    def load(*_, **__):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise FileNotFoundError("nothing kept")

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"no copy is kept here, and the hub does not answer: no network"):
        open_dataset("some/name", cache_dir=cache)
    assert seen == [True] and before == datasets.config.HF_HUB_OFFLINE


def test_a_name_on_the_hub(cache, monkeypatch, make_rows, hub_says):
    datasets = pytest.importorskip("datasets")
    hub_says()
    data = datasets.Dataset.from_list(make_rows(4))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or data)
    assert len(open_dataset("some/name", cache_dir=cache)) == 4
    assert asked == [(("some/name", None), {"split": "train"})]
    open_dataset("some/name", cache_dir=cache)
    assert len(asked) == 1, "it is in the cache"
    open_dataset("some/name:train_prefs", cache_dir=cache)
    assert asked[1] == (("some/name", None), {"split": "train_prefs"})


def test_long_rows_in_a_file(tmp_path, jsonl, cache):
    rows = [{"question": f"q{i // 2}", "answer": f"answer {i}", "is_correct": i % 2 == 0} for i in range(6)]
    assert [r[1:] for r in records(jsonl(tmp_path / "a.jsonl", rows), cache)] == [
        (f"q{i}", f"answer {2 * i}", f"answer {2 * i + 1}") for i in range(3)
    ]


GRADED = [{"question": "2+3?", "answer": a, "is_correct": a == "5"} for a in ("5", "6")]


def contents(folder):
    dataset = open_dataset(str(folder))
    found = [vars(record) for record in map(RecordReader(dataset), range(len(dataset)))]
    return [
        {name: value for name, value in fields.items() if name not in ("id", "meta", "template_kwargs")}
        for fields in found
    ]


@pytest.mark.parametrize("write", [write_parquet, write_jsonl_gz])
def test_long_rows_are_gathered_whatever_stands_before_them(tmp_path, write):
    source = write(tmp_path, [{"question": "1+1?", "answer": "2", "is_correct": None}, *GRADED])
    with pytest.raises(DataError, match="'is_correct' is empty"):  # and so not known to be right
        build([str(source)], tmp_path / "out", BuildOptions())
    build([str(source)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert contents(tmp_path / "out") == [{"prompt": "2+3?", "chosen": "5", "rejected": "6"}]


def test_long_rows_are_gathered_behind_a_broken_one(tmp_path, jsonl):
    source = jsonl(tmp_path / "a.jsonl", GRADED)
    source.write_text('{"question": "2+3?", "answer": "5", "is_correct": tr\n' + source.read_text())
    with pytest.raises(DataError, match=r"a\.jsonl:1: invalid JSON"):
        build([str(source)], tmp_path / "out", BuildOptions())
    build([str(source)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert contents(tmp_path / "out") == [{"prompt": "2+3?", "chosen": "5", "rejected": "6"}]


def test_only_the_first_long_rows_are_looked_at_beforehand(tmp_path, jsonl, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", GRADED * 1000)
    read = []
    gather = build_module._gather
    monkeypatch.setattr(build_module, "_gather", lambda row, *rest: read.append(row) or gather(row, *rest))
    check_rows(str(source))
    assert len(read) == 1000


def test_grades_in_shards_of_other_makers(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DIFFDPO_CACHE", str(cache))
    rows = [{"prompt": "q", "completion": "wrong", "is_correct": False}, {"prompt": "q", "completion": "right"}]
    write_shard(tmp_path / "a.tar", [(str(i), json.dumps(row).encode()) for i, row in enumerate(rows)])
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(r["answer"], r["label"]) for r in contents(tmp_path / "a.tar")] == [("right", True)]
    assert contents(tmp_path / "a.tar") == contents(lines), "graded answers are gathered, whatever holds them"


@pytest.fixture
def hub_folder(tmp_path, make_rows):
    """A data set as the hub serves it."""
    folder = tmp_path / "ufb"
    for start, split in enumerate(("train_prefs", "test_prefs", "test_sft")):
        path = write_parquet(tmp_path, make_rows(3 + start, start=10 * start))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path.rename(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    return folder


def test_the_split_of_a_folder_is_honoured(hub_folder, cache):
    assert [r[0] for r in records(f"{hub_folder}:test_prefs", cache)] == [f"r{i}" for i in range(10, 14)]
    build([str(hub_folder)], hub_folder.parent / "out", BuildOptions(source=SourceOptions("test_sft")))
    assert [r[0] for r in records(hub_folder.parent / "out", cache)] == [f"r{i}" for i in range(20, 25)]
    with pytest.raises(DataError, match=r"holds several splits \(.*train_prefs.*\); name one: .*ufb:test_prefs"):
        open_dataset(str(hub_folder), cache_dir=cache)
    with pytest.raises(DataError, match="has no split 'dev'; allowed: test_prefs, test_sft, train_prefs"):
        open_dataset(f"{hub_folder}:dev", cache_dir=cache)


def test_splits_and_configurations_that_a_readme_lists(hub_folder, cache):
    head = "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: one\n    path: data/test_*\n{}---\n"
    (hub_folder / "README.md").write_text(head.format("default", "  - split: two\n    path: data/train_*\n"))
    assert len(records(f"{hub_folder}:one", cache)) == 9
    assert len(records(f"{hub_folder}:two", cache)) == 3
    (hub_folder / "README.md").write_text(head.format("default", "- config_name: b\n  data_files: data/train_*\n"))
    options = BuildOptions(source=SourceOptions(config="b"))
    assert len(records(hub_folder, cache, build_options=options)) == 3
    with pytest.raises(DataError, match="cannot be told: BuilderConfig 'c' not found"):
        records(hub_folder, cache, build_options=BuildOptions(source=SourceOptions(config="c")))


def test_a_split_of_a_folder_by_a_relative_name_a_link_or_in_the_home(tmp_path, make_rows, jsonl, cache, monkeypatch):
    (tmp_path / "mix").mkdir()
    for number, name in enumerate(("train", "test")):
        jsonl(tmp_path / f"blob{number}", make_rows(3, start=10 * number))
        (tmp_path / "mix" / f"{name}.jsonl").symlink_to(tmp_path / f"blob{number}")
    (tmp_path / "link").symlink_to("mix")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mix", "./mix", "link", "~/link", f"{tmp_path}/link"):
        assert [r[0] for r in records(f"{name}:test", cache)] == ["r10", "r11", "r12"]


def test_a_split_without_data_files_is_said(hub_folder, cache):
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: one\n    path: '*.txt'\n---\n"
    (hub_folder / "README.md").write_text(head)
    (hub_folder / "words.txt").write_text("words")
    with pytest.raises(DataError, match=r"split 'one' has no data file; allowed: \.csv"):
        open_dataset(f"{hub_folder}:one", cache_dir=cache)


def test_a_folder_with_letters_of_patterns_in_its_name(tmp_path, make_rows, jsonl, cache):
    folder = tmp_path / "set[v1]"
    folder.mkdir()
    for name in ("train", "test"):
        jsonl(folder / f"{name}.jsonl", make_rows(3))
    assert len(records(f"{folder}:test", cache)) == 3
    (folder / "test.jsonl").unlink()
    assert len(records(folder, cache)) == 3


def test_train_and_test_files_of_a_folder_are_not_mixed(tmp_path, make_rows, jsonl, cache):
    folder = tmp_path / "hh"
    folder.mkdir()
    for name in ("train", "test"):
        jsonl(folder / f"{name}.jsonl", make_rows(3))
    with pytest.raises(DataError, match=r"several splits \(train, test\)"):
        open_dataset(str(folder), cache_dir=cache)
    assert len(records(f"{folder}:test", cache)) == 3


def test_a_split_that_cannot_be_chosen_is_refused(tmp_path, make_rows, jsonl, cache):
    source = jsonl(tmp_path / "a.jsonl", make_rows(3))
    saved = write_saved_dataset(tmp_path, make_rows(3))
    build([str(source)], tmp_path / "shards", BuildOptions())
    named = BuildOptions(source=SourceOptions("test"))
    refused = pytest.raises(DataError, match="there is no split 'test' to choose")
    for name in (source, tmp_path / "shards", tmp_path / "shards" / "shard-00000.tar"):
        with refused:
            open_dataset(str(name), cache_dir=cache, build_options=named)
        with refused:
            build([str(name)], tmp_path / "out", named)
    with refused:
        open_dataset(str(tmp_path / "shards" / "*.tar"), cache_dir=cache, build_options=named)
    with refused:
        open_dataset(f"{source}:test", cache_dir=cache)
    with pytest.raises(DataError, match="has no split 'test'; allowed: train"):
        open_dataset(str(saved), cache_dir=cache, build_options=named)


def test_json_in_a_csv_cell_is_text_unless_its_column_may_hold_it(tmp_path):
    messages = json.dumps([{"role": "assistant", "content": "[5]"}])
    row = {"prompt": "[x]", "chosen": "[1, 2, 3]", "rejected": '{"a": 1}', "answers": '["5", "6"]'}
    row |= {
        "correct": "[true, false]",
        "messages": messages,
        "6b": '{"solution": "5", "is_correct": true}',
        "meta": "{}",
    }
    (read,) = open_rows(str(write_csv(tmp_path, [row])), SourceOptions())
    assert read.data == row
    assert dict(Fields(read.data)) == row | {
        "answers": ["5", "6"],
        "correct": [True, False],
        "messages": json.loads(messages),
        "6b": {"solution": "5", "is_correct": True},
        "meta": {},
    }


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("prompt,chosen,rejected\nQ1,good,bad\nQ2,,bad\nQ3,good,\n", {"empty_chosen": 1, "empty_rejected": 1}),
        ("prompt,chosen,rejected\nQ1,good,bad\n,good dog,good cat\n", {}),  # an implicit prompt
        ('prompt,chosen,rejected\n,"\n\nHuman: Hi\n\nAssistant: a","\n\nHuman: Hi\n\nAssistant: b"\n', {}),
        ("prompt,question,completion,label\n,Q1,a,true\nQ2,,a,true\n,,a,true\n", {"empty_prompt": 1}),
        ("prompt,completion,label\nQ1,a,true\nQ2,,false\n", {"empty_answer": 1}),
        ("question,answer\nQ1,a\nQ2,\n", {"empty_answer": 1}),
        ("prompt,chosen,rejected,completion,label\nQ1,,,a,true\nQ1,good,bad,,\n", {}),  # two formats in one table
    ],
)
def test_empty_csv_cells_are_counted(tmp_path, text, dropped):
    (tmp_path / "x.csv").write_text(text)
    report = build([str(tmp_path / "x.csv")], tmp_path / "out", BuildOptions())["provenance"]["report"]
    assert {kind: item["count"] for kind, item in report["dropped"].items()} == dropped
    assert report["records"] == report["rows"] - sum(dropped.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": {"0": "a", "1": "b"}, "chosen": {"0": "c", "1": "d"}}, "orient='records'"),
        ({"0": {"prompt": "a", "chosen": "c"}, "1": {"prompt": "b", "chosen": "d"}}, "orient='records'"),
        ({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}, "2 lists .train, test.; give each a file"),
    ],
)
def test_tables_in_another_order_are_refused_by_what_they_are(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        list(open_rows(str(path), SourceOptions()))


def test_a_json_file_of_one_row_is_that_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for data, rows in ((row, [row]), ({"version": 1, "data": [row, row]}, [row, row])):
        (tmp_path / "a.json").write_text(json.dumps(data))
        assert [found.data for found in open_rows(str(tmp_path / "a.json"), SourceOptions())] == rows


@pytest.mark.parametrize("kept_as", ["saved", "parquet"])
def test_classes_are_what_their_names_say(tmp_path, kept_as):
    import datasets

    features = {"prompt": datasets.Value("string"), "completion": datasets.Value("string")}
    columns = {"prompt": ["p", "q", "r"], "completion": ["a", "b", "c"], "label": [0, 1, None]}
    named = datasets.Features(features | {"label": datasets.ClassLabel(names=["good", "bad"])})
    data = datasets.Dataset.from_dict(columns, features=named)
    source = tmp_path / ("x.parquet" if kept_as == "parquet" else "saved")
    data.to_parquet(source) if kept_as == "parquet" else data.save_to_disk(source)
    build([str(source)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert [row["label"] for row in contents(tmp_path / "out")] == [True, False]


def test_a_damaged_saved_dataset_is_one_line(tmp_path, make_rows):
    saved = write_saved_dataset(tmp_path, make_rows(3))
    (arrow,) = saved.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match="no saved data set that can be read"):
        list(open_rows(str(saved), SourceOptions()))


def test_a_folder_tells_what_it_does_not_read_and_mixes_no_splits(tmp_path, jsonl, make_rows, caplog, cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", make_rows(2))
    jsonl(folder / "b.JSONL", make_rows(2, start=2))
    for name in ("c.jsonl.zst", "README.md", "d.arrow"):
        (folder / name).write_text("x")
    assert len(open_dataset(str(folder), cache_dir=cache)) == 4
    assert "2 files are not read for their ending: c.jsonl.zst, d.arrow" in caplog.text
    jsonl(folder / "test.jsonl", make_rows(2, start=4))
    with pytest.raises(DataError, match="the split test and, besides, files of no split"):
        open_dataset(str(folder), cache_dir=cache)
    assert len(open_dataset(f"{folder}:test", cache_dir=cache)) == 2


@pytest.mark.parametrize("ending", [".JSONL.GZ", ".TSV", ".Json"])
def test_endings_in_capitals(tmp_path, ending):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    text = {".TSV": "prompt\tchosen\trejected\nq\ta\tb\n"}.get(ending, json.dumps(row))
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("GZ") else text.encode())
    assert [read.parsed() for read in open_rows(str(path), SourceOptions())] == [row]


def test_what_was_dropped_is_told_with_the_first_place(tmp_path, jsonl, make_rows, caplog, cache):
    jsonl(tmp_path / "x.jsonl", [*make_rows(2), {"prompt": "", "chosen": "a", "rejected": "b"}])
    open_dataset(str(tmp_path / "x.jsonl"), cache_dir=cache)
    assert "dropped: empty_prompt 1 (first: x.jsonl:3: the prompt is empty)" in caplog.text
