"""Building: the same bytes for the same input, whole or not at all, nothing done twice, prompts on one side."""

import gzip
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_pipeline.shard_builder as build_module
from data_pipeline.convert import ConvertOptions
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.index import MANIFEST, load_index
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.shards import scan_shard, write_shard
from data_pipeline.split import eval_mask
from data_pipeline.stages import RecordReader


def read_all(folder):
    dataset = open_dataset(str(folder))
    reader = RecordReader(dataset)
    return [reader(i) for i in range(len(dataset))]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def dropped(manifest):
    return {kind: item["count"] for kind, item in manifest["provenance"]["report"]["dropped"].items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_same_bytes_for_the_same_input(tmp_path, jsonl, make_rows, workers, monkeypatch):
    monkeypatch.setattr(build_module, "ROWS_PER_CHUNK", 7)
    source = jsonl(tmp_path / "a.jsonl", make_rows(50))
    options = BuildOptions(shard_size=12, shuffle_seed=3)
    first = build([str(source)], tmp_path / "one", options)
    other = build([str(source)], tmp_path / "two", options, workers=workers)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert first == other
    assert [shard["records"] for shard in first["shards"]] == [12, 12, 12, 12, 2]
    assert {record.id for record in read_all(tmp_path / "one")} == {f"r{i}" for i in range(50)}
    for shard in first["shards"]:
        scan = scan_shard(tmp_path / "one" / shard["name"])
        assert (scan.sha256, scan.size, scan.bad) == (shard["sha256"], shard["bytes"], [])
    assert [path.name for path in tmp_path.glob("*.building")] == []


def test_order_on_disk(tmp_path, jsonl, make_rows):
    source = str(jsonl(tmp_path / "a.jsonl", make_rows(20)))
    build([source], tmp_path / "plain", BuildOptions())
    assert [r.id for r in read_all(tmp_path / "plain")] == [f"r{i}" for i in range(20)]
    build([source], tmp_path / "mixed", BuildOptions(shuffle_seed=1))
    assert [r.id for r in read_all(tmp_path / "mixed")] != [f"r{i}" for i in range(20)]


def test_drops_are_counted_by_kind_with_their_places(tmp_path, jsonl, make_rows):
    rows = make_rows(4)
    rows += [rows[0] | {"id": "again"}, rows[1] | {"chosen": " "}, rows[2] | {"rejected": rows[2]["chosen"]}]
    rows += [rows[3] | {"id": "long", "chosen": "x" * 500}]
    options = BuildOptions(convert=ConvertOptions(max_bytes=300))
    manifest = build([str(jsonl(tmp_path / "a.jsonl", rows))], tmp_path / "out", options)
    assert dropped(manifest) == {"duplicate": 1, "empty_chosen": 1, "chosen_equals_rejected": 1, "over_long": 1}
    report = manifest["provenance"]["report"]
    assert report["dropped"]["empty_chosen"]["examples"] == ["a.jsonl:6: chosen is empty"]
    assert (report["rows"], report["records"], manifest["num_records"]) == (8, 4, 4)


def test_an_id_with_two_contents_is_made_unique(tmp_path, jsonl, make_rows):
    rows = [row | {"id": "same"} for row in make_rows(3)]
    build([str(jsonl(tmp_path / "a.jsonl", rows))], tmp_path / "out", BuildOptions(shard_size=2))
    ids = [record.id for record in read_all(tmp_path / "out")]
    assert ids[0] == "same"
    assert len(set(ids)) == 3
    assert all(name.startswith("same") for name in ids)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "q", "chosen": "a"}', r"a\.jsonl:3: missing field 'rejected'"),
        ('{"prompt": "q", ', r"a\.jsonl:3: invalid JSON"),
        ('{"prompt": 3, "chosen": "a", "rejected": "b"}', r"a\.jsonl:3: field 'prompt' is int"),
        ("[1, 2]", r"a\.jsonl:3: a JSON object is needed"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, jsonl, make_rows, line, message, cache):
    source = jsonl(tmp_path / "a.jsonl", make_rows(2))
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        open_dataset(str(source), cache_dir=cache)
    assert not list(cache.rglob(MANIFEST))
    manifest = build([str(source)], tmp_path / "out", BuildOptions(on_error="skip"))
    assert manifest["num_records"] == 2
    assert sum(dropped(manifest).values()) == 1


def test_nothing_usable(tmp_path, jsonl, make_rows):
    rows = [row | {"chosen": ""} for row in make_rows(3)]
    with pytest.raises(DataError, match=r"no usable record in 3 rows.*empty_chosen 3.*a\.jsonl:1"):
        build([str(jsonl(tmp_path / "a.jsonl", rows))], tmp_path / "out", BuildOptions())
    with pytest.raises(DataError, match="has no rows"):
        build([str(jsonl(tmp_path / "b.jsonl", []))], tmp_path / "out", BuildOptions())


def test_an_interrupted_build_is_invisible_and_goes_on(tmp_path, jsonl, make_rows, monkeypatch):
    monkeypatch.setattr(build_module, "ROWS_PER_CHUNK", 5)
    source, out = str(jsonl(tmp_path / "a.jsonl", make_rows(40))), tmp_path / "out"
    options = BuildOptions(shard_size=10, eval_fraction=0.3, shuffle_seed=1)
    build([source], tmp_path / "whole", options)
    made = Counter()

    def interrupted(path, members):
        made[path] += 1
        if len(made) == 3:
            raise KeyboardInterrupt
        write_shard(path, members)

    monkeypatch.setattr(build_module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build([source], out, options)
    assert not out.exists()
    with pytest.raises(DataError):
        open_dataset(str(out))
    chunks = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.building").glob("chunks/*.bin")}
    assert len(chunks) == 8
    monkeypatch.setattr(
        build_module, "write_shard", lambda path, members: (made.update([path]), write_shard(path, members))
    )
    stamps = []
    monkeypatch.setattr(
        build_module.shutil, "rmtree", lambda path, **_: stamps.append({p: p.stat().st_mtime_ns for p in chunks})
    )
    build([source], out, options)
    assert stamps == [chunks], "finished chunks were made again"
    assert sorted(made.values()) == [1] * (len(made) - 1) + [2], "only the interrupted shard is made again"
    for side in ("train", "eval"):
        assert shard_bytes(out / side) == shard_bytes(tmp_path / "whole" / side)


def test_a_finished_build_appears_by_one_rename(tmp_path, jsonl, make_rows, monkeypatch):
    def refused(self, target):
        raise OSError("no rename")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DataError, match="no rename"):
        build([str(jsonl(tmp_path / "a.jsonl", make_rows(5)))], tmp_path / "out", BuildOptions())
    assert not (tmp_path / "out").exists()


DIE_WHILE_BUILDING = """
import signal, sys
import data_pipeline.shard_builder as module
from data_pipeline.shards import write_shard
written = []
def dying(path, members):
    write_shard(path, members)
    written.append(path)
    if len(written) == int(sys.argv[3]):
        signal.raise_signal(signal.SIGKILL)
module.write_shard = dying
module.build([sys.argv[1]], sys.argv[2], module.BuildOptions(shard_size=10))
"""
OPEN = """
import sys
from data_pipeline.dataset import open_dataset
print(open_dataset(sys.argv[1], cache_dir=sys.argv[2]).fingerprint)
"""


def start(script, *arguments):
    """A Python process of its own; quick, as nothing here imports torch."""
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("after", [1, 4])
def test_kill_9(tmp_path, jsonl, make_rows, after):
    source, out = str(jsonl(tmp_path / "a.jsonl", make_rows(45))), tmp_path / "out"
    child = start(DIE_WHILE_BUILDING, source, out, after)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    build([source], out, BuildOptions(shard_size=10))
    build([source], tmp_path / "whole", BuildOptions(shard_size=10))
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_another_job_starts_over_and_a_finished_one_is_kept(tmp_path, jsonl, make_rows, monkeypatch):
    source, out = str(jsonl(tmp_path / "a.jsonl", make_rows(10))), tmp_path / "out"
    (tmp_path / "out.building" / "chunks").mkdir(parents=True)
    (tmp_path / "out.building" / "job.json").write_text("another job")
    (tmp_path / "out.building" / "chunks" / "chunk-000000.json").write_text("{}")
    first = build([source], out, BuildOptions())
    monkeypatch.setattr(build_module, "write_shard", None)  # would fail if called
    assert build([source], out, BuildOptions()) == first
    with pytest.raises(DataError, match="was not built from this input"):
        build([source], out, BuildOptions(shuffle_seed=1))


def test_several_processes_open_the_same_source_at_once(tmp_path, jsonl, make_rows, cache):
    source = jsonl(tmp_path / "a.jsonl", make_rows(500))
    children = [start(OPEN, source, cache) for _ in range(4)]
    try:
        prints = {child.communicate(timeout=60)[0] for child in children}
    finally:
        for child in children:
            child.kill()
    assert len(prints) == 1 and prints != {""}
    assert len(list(cache.rglob(MANIFEST))) == 1


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60, unique=True),
    st.lists(st.integers(0, 10_000), max_size=60),
    st.floats(0.01, 0.9),
    st.integers(0, 5),
)
def test_no_prompt_stands_on_both_sides(unique, repeats, fraction, seed):
    prompts = np.array(unique + [unique[i % len(unique)] for i in repeats], np.uint64)
    count = max(1, round(fraction * len(unique)))
    if count >= len(unique):
        with pytest.raises(DataError, match="leaves nothing to train on"):
            eval_mask(prompts, fraction, seed)
        return
    mask = eval_mask(prompts, fraction, seed)
    assert not set(prompts[mask].tolist()) & set(prompts[~mask].tolist())
    assert len(set(prompts[mask].tolist())) == count
    assert np.array_equal(eval_mask(prompts[::-1], fraction, seed), mask[::-1])


def test_split_folders_and_split_on_reading_agree(tmp_path, jsonl, make_rows, cache):
    rows = [row | {"prompt": f"question {i % 12}"} for i, row in enumerate(make_rows(40))]
    source = str(jsonl(tmp_path / "a.jsonl", rows))
    build([source], tmp_path / "out", BuildOptions(eval_fraction=0.25))
    sides = {}
    for side in ("train", "eval"):
        built = open_dataset(str(tmp_path / "out"), split=side, cache_dir=cache)
        split = open_dataset(source, split=side, eval_fraction=0.25, cache_dir=cache)
        sides[side], again = ({r.prompt for r in map(RecordReader(d), range(len(d)))} for d in (built, split))
        assert sides[side] == again
    assert not sides["train"] & sides["eval"]
    assert len(sides["eval"]) == 3
    with pytest.raises(DataError, match="not split"):
        open_dataset(source, split="eval", cache_dir=cache)


def test_a_prompt_in_two_sources_stays_on_one_side(tmp_path, jsonl, make_rows, cache):
    rows = make_rows(30)
    sources = [str(jsonl(tmp_path / "a.jsonl", rows[:20])), str(jsonl(tmp_path / "b.jsonl", [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": "c", "rejected": "d"} for row in rows[10:]
    ]))]  # fmt: skip
    prompts = []
    for side in ("train", "eval"):
        dataset = open_dataset(sources, split=side, eval_fraction=0.3, cache_dir=cache)
        prompts.append({int(p) for part in dataset.parts for p in part.column("prompt")})
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 9


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_a_prompt_of_a_built_split_stays_on_its_side_in_other_sources(tmp_path, jsonl, make_rows, cache, fraction):
    """The built folder and the file share 40 of their 50 prompts; a second folder has another split of some."""
    files = [str(jsonl(tmp_path / f"{start}.jsonl", make_rows(50, start=start))) for start in (0, 10, 20)]
    for number, share in ((0, 0.2), (2, 0.4)):
        build([files[number]], tmp_path / str(number), BuildOptions(eval_fraction=share))
    sides = {}
    for side in ("train", "eval") if fraction else ("train",):
        dataset = open_dataset(
            [str(tmp_path / "0"), files[1], str(tmp_path / "2")], split=side, eval_fraction=fraction, cache_dir=cache
        )
        sides[side] = [set(part.column("prompt").tolist()) for part in dataset.parts]
    held_out = [set(load_index(tmp_path / name / "eval").entries["prompt"].tolist()) for name in "02"]
    trained = set.union(*sides["train"])
    assert not trained & set.union(*held_out)
    if fraction:
        assert not trained & set.union(*sides["eval"])
        assert sides["eval"][0] == held_out[0] and sides["eval"][2] == held_out[1]
        everything = open_dataset([files[1]], cache_dir=cache).parts[0].column("prompt").tolist()
        assert sides["train"][1] | sides["eval"][1] == set(everything)


def test_shards_are_a_source_too(tmp_path, jsonl, make_rows):
    """Shuffled anew, of another size, and with what is damaged refused or counted."""
    build([str(jsonl(tmp_path / "a.jsonl", make_rows(20)))], tmp_path / "one", BuildOptions(shard_size=10))
    build([str(tmp_path / "one")], tmp_path / "two", BuildOptions(shard_size=4, shuffle_seed=1))
    before, after = ({r.id: r for r in read_all(tmp_path / name)} for name in ("one", "two"))
    assert before == after
    shard = tmp_path / "one" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"shard-00001\.tar: \d faults, first .*--on_error skip"):
        build([str(tmp_path / "one")], tmp_path / "three", BuildOptions())
    manifest = build([str(tmp_path / "one")], tmp_path / "three", BuildOptions(on_error="skip"))
    assert 10 < manifest["num_records"] < 20
    assert dropped(manifest) == {"damaged_shard": 1}


def test_the_sides_of_a_split_are_not_mixed_by_a_build(tmp_path, jsonl, make_rows):
    build([str(jsonl(tmp_path / "a.jsonl", make_rows(20)))], tmp_path / "one", BuildOptions(eval_fraction=0.2))
    with pytest.raises(DataError, match="holds a train/eval split, which a build would mix"):
        build([str(tmp_path / "one")], tmp_path / "two", BuildOptions())
    assert build([str(tmp_path / "one" / "train")], tmp_path / "two", BuildOptions())["num_records"] == 16


def test_compressed_shards_are_a_source_too(tmp_path, jsonl, make_rows):
    build([str(jsonl(tmp_path / "a.jsonl", make_rows(20)))], tmp_path / "one", BuildOptions(shard_size=10))
    packed = tmp_path / "packed"
    packed.mkdir()
    for shard, ending in zip(sorted((tmp_path / "one").glob("*.tar")), ("tar.gz", "tgz"), strict=True):
        (packed / f"{shard.stem}.{ending}").write_bytes(gzip.compress(shard.read_bytes()))
    whole = build([str(packed)], tmp_path / "two", BuildOptions())
    assert whole["fingerprint"] == load_index(tmp_path / "one").fingerprint
    cut = packed / "shard-00001.tgz"
    cut.write_bytes(cut.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"shard-00001\.tgz: \d faults, first damaged_gzip.*--on_error skip"):
        build([str(packed)], tmp_path / "three", BuildOptions())
    assert 10 <= build([str(packed)], tmp_path / "three", BuildOptions(on_error="skip"))["num_records"] < 20


def test_manifest_says_where_it_comes_from(tmp_path, jsonl, make_rows):
    source = jsonl(tmp_path / "pairs.jsonl", make_rows(3))
    build([str(source)], tmp_path / "out", BuildOptions())
    index = load_index(tmp_path / "out")
    assert index.manifest["sources"] == ["pairs"]
    assert index.manifest["provenance"]["job"]["sources"] == [str(source)]


@pytest.mark.parametrize("wrong", [{"shard_size": 0}, {"eval_fraction": 1.0}, {"on_error": "ignore"}, {"limit": -1}])
def test_wrong_options(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        BuildOptions(**wrong)
