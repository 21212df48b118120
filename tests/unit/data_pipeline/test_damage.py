"""Damaged shards: everything that is lost is named, nothing is lost in silence, order and step count stay."""

import gzip
import json
import os
import tarfile
from io import BytesIO

import numpy as np
import pytest

from data_pipeline.__main__ import main
from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.reader import PairLoader
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.shards import scan_shard, write_shard

PER_SHARD, SHARDS = 10, 3
REST = ("checksums", "digest")  # what an index of an earlier version lacks


@pytest.fixture
def built(tmp_path, jsonl, make_rows):
    """A folder of three shards of ten records; r10 .. r19 are in the middle one."""
    folder = tmp_path / "built"
    build([str(jsonl(tmp_path / "a.jsonl", make_rows(PER_SHARD * SHARDS)))], folder, BuildOptions(shard_size=PER_SHARD))
    return folder


def foreign(folder):
    """The same shards without their index."""
    for name in ("manifest.json", "entries.npy", "keys.npy"):
        (folder / name).unlink()
    return folder


def members(path):
    with tarfile.open(path) as tar:
        return [(info.name, info.offset, info.offset_data, info.size) for info in tar]


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def cut_between_members(path):
    path.write_bytes(path.read_bytes()[: members(path)[5][1]])


def cut_inside_data(path):
    path.write_bytes(path.read_bytes()[: members(path)[5][2] + 10])


def cut_inside_header(path):
    path.write_bytes(path.read_bytes()[: members(path)[5][1] + 100])


def flip_header(path):
    overwrite(path, members(path)[5][1], b"\xff" * 16)


def flip_data(path):
    overwrite(path, members(path)[5][2] + 3, b"\xff")


def empty(path):
    path.write_bytes(b"")


# what of the ten records of the shard is still read, by offset (an index is there) and by a fresh scan; what both say
DAMAGES = [
    (cut_between_members, 5, 5, "truncated_shard", "no_end_of_archive"),
    (cut_inside_data, 5, 5, "truncated_shard", "truncated"),
    (cut_inside_header, 5, 5, "truncated_shard", "no_end_of_archive"),
    (flip_header, 10, 5, "", "no_end_of_archive"),
    (flip_data, 9, 9, "changed_record", "invalid_json"),
    (empty, 0, 0, "truncated_shard", "no_end_of_archive"),
]


def consume(folder, tokenizer, cache, **options):
    dataset = open_dataset(str(folder), cache_dir=cache, allow_damaged=True)
    options = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 2, "max_fault_fraction": 1.0} | options
    loader = PairLoader(dataset, Encoder(tokenizer), **options)
    batches = list(loader)
    return loader, batches


@pytest.mark.parametrize(("damage", "by_offset", "_", "kind", "__"), DAMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_after_indexing(built, tokenizer, cache, damage, by_offset, _, kind, __, workers):
    whole = {(b.step, b.micro): b.ids for b in consume(built, tokenizer, cache)[1]}
    shard = built / "shard-00001.tar"
    damage(shard)
    loader, batches = consume(built, tokenizer, cache, num_workers=workers)
    assert loader.epoch == 1 and len(batches) == len(whole)
    faults = [fault for batch in batches for fault in batch.faults]
    assert len(faults) == PER_SHARD - by_offset == sum(loader.faults.values())
    assert {(fault.shard, fault.kind) for fault in faults} == ({(str(shard), kind)} if kind else set())
    lost = {f"r{int(fault.key)}" for fault in faults}
    for batch in batches:
        expected = tuple("" if name in lost else name for name in whole[batch.step, batch.micro])
        assert batch.ids == expected, "order and all other records stay"
        assert batch.pair_weight_B.tolist() == [float(bool(name)) for name in expected]
    if faults:
        with pytest.raises(DataError, match=r"shard-00001\.tar, record 0000000\d\d: "):
            consume(built, tokenizer, cache, strict=True)


@pytest.mark.parametrize(("damage", "by_offset", "scanned", "_", "kind"), DAMAGES)
def test_damage_found_by_verify_and_by_a_fresh_scan(built, cache, capsys, damage, by_offset, scanned, _, kind):
    assert main(["verify", str(built), "--cache_dir", str(cache)]) == 0
    damage(built / "shard-00001.tar")
    scan = scan_shard(built / "shard-00001.tar")
    assert len(scan.keys) == scanned
    assert kind in {bad.kind for bad in scan.bad}
    capsys.readouterr()
    report = built / "report.json"
    assert main(["verify", str(built), "--cache_dir", str(cache), "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert "DAMAGED" in printed and kind in printed
    lost = {record["shard"]: record["lost"] for record in json.loads(report.read_text())}
    assert len(lost[str(built / "shard-00001.tar")]) == PER_SHARD - by_offset
    assert f"{PER_SHARD - by_offset} of 10 records lost" in printed
    index_free = open_dataset(str(foreign(built)), cache_dir=cache)
    assert len(index_free) == PER_SHARD * (SHARDS - 1) + scanned
    assert kind in {bad["kind"] for bad in index_free.manifest["bad"]}


def test_the_length_of_a_shard_is_checked_before_training(built, cache):
    cut_inside_data(built / "shard-00002.tar")
    with pytest.raises(DataError, match=r"shard-00002\.tar has \d+ bytes, the index says \d+;.*verify"):
        open_dataset(str(built), cache_dir=cache)
    (built / "shard-00002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.tar is missing"):
        open_dataset(str(built), cache_dir=cache)


def test_a_shard_deleted_while_training(built, tokenizer, cache):
    dataset = open_dataset(str(built), cache_dir=cache)
    options = {"seed": 1, "global_batch_size": 2, "micro_batch_size": 2, "max_fault_fraction": 1.0}
    loader = PairLoader(dataset, Encoder(tokenizer), shuffle_shards=1, **options)
    steps = loader.steps()
    seen = [next(steps)[0]]
    for path in built.glob("*.tar"):
        path.unlink()
    seen += [next(steps)[0] for _ in range(14)]
    read = [name for batch in seen for name in batch.ids if name]
    assert len(read) == PER_SHARD, "the open shard stays readable"
    assert loader.faults == {"missing_shard": 20}


def test_a_shard_replaced_by_one_of_the_same_length(built, tokenizer, cache, make_rows):
    """Nothing of the other shard may be trained on, however alike it looks."""
    shard = built / "shard-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"good", b"evil"))
    loader, _ = consume(built, tokenizer, cache)
    assert loader.faults == {"changed_record": 10}
    loader, _ = consume(built, tokenizer, cache, max_fault_fraction=0.4)
    with pytest.raises(DataError, match=r"faulty, more than max_fault_fraction 0\.1 allows.*changed_record"):
        consume(built, tokenizer, cache, max_fault_fraction=0.1)


def test_replaced_shards_without_index_are_indexed_again(built, cache, make_rows, jsonl, tmp_path):
    folder = foreign(built)
    assert len(open_dataset(str(folder), cache_dir=cache)) == 30
    lines = [(f"k{i}", json.dumps(row).encode()) for i, row in enumerate(make_rows(4, start=90))]
    write_shard(folder / "shard-00001.tar", lines)
    assert len(open_dataset(str(folder / "*.tar"), cache_dir=cache)) == 24


def shard_of(path, contents):
    write_shard(path, [(f"{i:03d}", data) for i, data in enumerate(contents)])


def test_bad_records_in_shards_of_others(tmp_path, cache, make_rows, tokenizer):
    good = [json.dumps(row).encode() for row in make_rows(6)]
    shard_of(tmp_path / "a.tar", [*good[:4], b"{", b'{"prompt": "q"}', b"[]", good[0]])
    shard_of(tmp_path / "b.tar", [good[1], *good[4:]])
    with (tmp_path / "c.tar").open("wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        for name in ("x.txt", "v1.2.json", "fine.json", "fine.json"):
            data = json.dumps(make_rows(1, start=50)[0]).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    dataset = open_dataset(str(tmp_path / "{a,b,c}.tar"), cache_dir=cache)
    assert len(dataset) == 7
    found = sorted((bad["shard"][-5:], bad["kind"]) for bad in dataset.manifest["bad"])
    assert found == [
        ("a.tar", "duplicate_id"),
        ("a.tar", "invalid_json"),
        ("a.tar", "missing_field"),
        ("a.tar", "wrong_type"),
        ("b.tar", "duplicate_id"),
        ("c.tar", "duplicate_key"),
        ("c.tar", "foreign_member"),
        ("c.tar", "foreign_member"),
    ]
    options = {"seed": 0, "global_batch_size": 7, "micro_batch_size": 7}
    (batch,) = PairLoader(dataset, Encoder(tokenizer), **options)
    assert sorted(batch.ids) == ["r0", "r1", "r2", "r3", "r4", "r5", "r50"]
    with pytest.raises(DataError, match=r"8 unusable: duplicate_id 2.*without --strict"):
        PairLoader(dataset, Encoder(tokenizer), strict=True, **options)


def test_compressed_shards(built, cache, tokenizer, tmp_path):
    folder = tmp_path / "gz"
    folder.mkdir()
    for path in built.glob("*.tar"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    whole = open_dataset(str(folder / "*.tar.gz"), cache_dir=cache)
    assert whole.fingerprint == open_dataset(str(foreign(built)), cache_dir=cache).fingerprint
    loader, _ = consume(folder, tokenizer, cache)
    assert not loader.faults
    first = folder / "shard-00000.tar.gz"
    first.write_bytes(first.read_bytes()[:-200])
    cut = open_dataset(str(folder), cache_dir=cache)
    assert 20 <= len(cut) < 30
    assert "damaged_gzip" in {bad["kind"] for bad in cut.manifest["bad"]}


def test_verify_knows_what_shards_without_index_held_before(built, cache, capsys):
    folder = foreign(built)
    command = ["verify", str(folder), "--cache_dir", str(cache)]
    assert main(command) == 0
    assert "no earlier index to compare with" in capsys.readouterr().out
    assert main(command) == 0
    assert "no earlier index" not in capsys.readouterr().out
    whole = (folder / "shard-00001.tar").read_bytes()
    cut_between_members(folder / "shard-00001.tar")
    for time in (1, 2):
        os.utime(folder / "shard-00000.tar", (time, time))  # indexed anew each time
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert "no_end_of_archive" in printed and "5 of 10 records lost: 000000015, 000000016," in printed
        assert "3 shards, 30 indexed records: 5 lost" in printed
    keep = members(folder / "shard-00002.tar")[3][1]
    (folder / "shard-00002.tar").write_bytes((folder / "shard-00002.tar").read_bytes()[:keep] + bytes(1024))
    (folder / "shard-00001.tar").write_bytes(whole)
    assert main(command) == 1, "cut, and closed as an archive of its own"
    assert "DAMAGED" in (printed := capsys.readouterr().out) and "7 of 10 records lost" in printed


def test_a_note_of_the_last_index_that_is_empty_counts_as_absent(built, cache):
    folder = foreign(built)
    open_dataset(str(folder), cache_dir=cache)
    (note,) = (cache / "index").glob("*.last")
    note.write_text("")
    os.utime(folder / "shard-00000.tar", (1, 1))
    assert len(open_dataset(str(folder), cache_dir=cache)) == 30
    assert note.read_text() and not list(cache.rglob("*.partial"))


def test_nothing_but_damage(tmp_path, cache):
    (tmp_path / "a.tar").write_bytes(b"words" * 1000)
    with pytest.raises(DataError, match=r"no usable record in 1 shards.*a\.tar"):
        open_dataset(str(tmp_path / "a.tar"), cache_dir=cache)
    write_shard(tmp_path / "b.tar", [])
    with pytest.raises(DataError, match="no usable record in 1 shards: nothing is in them"):
        open_dataset(str(tmp_path / "b.tar"), cache_dir=cache)


def test_a_damaged_index_is_refused(built, cache):
    (built / "entries.npy").write_bytes((built / "entries.npy").read_bytes()[:-10])
    with pytest.raises(DataError, match="index is damaged"):
        open_dataset(str(built), cache_dir=cache)
    manifest = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(DataError, match="schema 99, this version reads 1"):
        open_dataset(str(built), cache_dir=cache)
    (built / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_dataset(str(built), cache_dir=cache)


@pytest.mark.parametrize("name", ["entries.npy", "keys.npy", "manifest.json"])
@pytest.mark.parametrize("kind", ["bit", "zeros", "cut"])
def test_no_damage_of_an_index_is_silent(built, cache, capsys, name, kind):
    """Wherever it is: the loader refuses the index, and verify says so."""
    path = built / name
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for place in sorted({0, len(whole) - 1, *random.integers(0, len(whole), 12).tolist()}):
        data = bytearray(whole)
        if kind == "bit":
            data[place] ^= 1 << int(random.integers(8))
        elif kind == "zeros":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        else:
            del data[place:]
        path.write_bytes(data)
        if data == whole:
            continue
        with pytest.raises(DataError):
            open_dataset(str(built), cache_dir=cache)
        assert main(["verify", str(built), "--cache_dir", str(cache)]) == 1
        assert "damaged_index" in capsys.readouterr().out
    path.write_bytes(whole)
    assert main(["verify", str(built), "--cache_dir", str(cache)]) == 0


@pytest.mark.parametrize("field", ["offset", "size", "crc", "id", "content", "prompt", "chosen_bytes"])
def test_verify_reads_what_the_loader_would_of_an_index_without_checksums(built, cache, capsys, field):
    manifest = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in REST}))
    assert main(["verify", str(built), "--cache_dir", str(cache)]) == 0
    assert "the index has no checksums" in capsys.readouterr().out
    entries = np.load(built / "entries.npy")
    entries[field][12] += 1
    np.save(built / "entries.npy", entries)
    assert main(["verify", str(built), "--cache_dir", str(cache)]) == 1
    assert "damaged_index" in (printed := capsys.readouterr().out) and "1 of 10 records lost: 000000012" in printed


def test_a_run_that_drops_nearly_everything_stops(built, cache, tokenizer):
    dataset = open_dataset(str(built), cache_dir=cache)
    encoder = Encoder(tokenizer, max_length=12, max_prompt_length=3, truncation="drop")
    loader = PairLoader(dataset, encoder, seed=0, global_batch_size=10, micro_batch_size=10)
    with pytest.raises(DataError, match=r"30 of 30 records were dropped when encoded \(over_long_prompt 30\)"):
        list(loader)
