"""What a tar holds, by webdataset's rules; claims of headers are not believed, and nothing is lost in silence."""

import io
import json
import tarfile

import pytest
import webdataset as wds

from data_pipeline.__main__ import main
from data_pipeline.dataset import open_dataset
from data_pipeline.members import RECORD, Bad, Member, read_members
from data_pipeline.stages import RecordReader

ROW = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}).encode()


def row(number):
    return json.dumps({"prompt": f"q{number}", "chosen": "a", "rejected": "b"}).encode()


def write(path, names, special=()):
    """A tar with a row under each name, and then the given members without content."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(row(number))
            tar.addfile(info, io.BytesIO(row(number)))
        for info in special:
            tar.addfile(info)
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def claim(path, number, size):
    """Let the header of a member claim a size in GNU's binary form, with a checksum that fits."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[number].offset
    data = bytearray(path.read_bytes())
    header = data[offset : offset + 512]
    value = size if size >= 0 else (1 << 88) + size
    header[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + value.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[offset : offset + 512] = header
    path.write_bytes(data)


def keys_and_kinds(path):
    items = list(read_members(path))
    return [i.key for i in items if isinstance(i, Member)], [i.kind for i in items if isinstance(i, Bad)]


NAMES = ["./000.json", "a/b.c/001.json", "v1.2/002.json", "./x/../003.JSON", "plain.json", "sub/dir/004.json"]


def test_keys_are_those_of_webdataset(tmp_path, cache):
    path = write(tmp_path / "a.tar", NAMES)
    theirs = [sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)]
    assert keys_and_kinds(path) == (theirs, [])
    assert len(open_dataset(str(path), cache_dir=cache)) == len(NAMES)


def test_links_devices_and_hidden_files_are_counted_as_left_out(tmp_path, cache):
    others = [
        special("link.json", tarfile.SYMTYPE, "000.json"),
        special("hard.json", tarfile.LNKTYPE, "000.json"),
        special("null.json", tarfile.CHRTYPE),
        special("disk.json", tarfile.BLKTYPE),
        special("pipe.json", tarfile.FIFOTYPE),
        special("folder.json", tarfile.DIRTYPE),
    ]
    path = write(tmp_path / "a.tar", ["000.json", "._000.json", ".DS_Store", "notes.txt"], others)
    assert keys_and_kinds(path) == (["000"], ["foreign_member"] * 8)
    dataset = open_dataset(str(path), cache_dir=cache)
    assert len(dataset) == 1
    assert [bad["kind"] for bad in dataset.manifest["bad"]] == ["foreign_member"] * 8
    assert main(["build", str(path), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    report = json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]["report"]
    assert report["records"] == 1 and report["dropped"]["foreign_member"]["count"] == 8


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, (1 << 87) - 1, 100_000, -1, -512, -(1 << 40)])
@pytest.mark.parametrize("number", [1, 2])
def test_a_header_that_claims_too_much_is_a_bad_record(tmp_path, cache, size, number):
    path = write(tmp_path / "a.tar", ["000.json", "001.json", "002.json"])
    claim(path, number, size)
    keys, kinds = keys_and_kinds(path)
    assert keys == ["000", "001"][:number] and kinds
    dataset = open_dataset(str(path), cache_dir=cache)
    assert len(dataset) == number and dataset.manifest["bad"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 62, -1024])
def test_headers_about_headers_that_claim_too_much(tmp_path, kind, size):
    path = write(tmp_path / "a.tar", ["000.json", "001.json", "002.json"])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[1].offset
    claim(path, 1, size)
    data = bytearray(path.read_bytes())
    header = data[offset : offset + 512]
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[offset : offset + 512] = header
    path.write_bytes(data)
    keys, kinds = keys_and_kinds(path)
    assert keys == ["000"] and kinds


def test_a_tail_of_zeros_and_data_behind_the_end_are_told(tmp_path):
    path = write(tmp_path / "a.tar", [f"{i:03d}.json" for i in range(40)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [info.offset for info in tar]
    assert keys_and_kinds(path)[1] == []
    path.write_bytes(whole[: places[10]] + bytes(len(whole) - places[10]))
    assert keys_and_kinds(path) == ([f"{i:03d}" for i in range(10)], ["zero_filled_tail"])
    path.write_bytes(whole[: places[10]] + bytes(places[14] - places[10]) + whole[places[14] :])
    keys, kinds = keys_and_kinds(path)
    assert len(keys) == 10 and kinds == ["data_behind_end"]
    path.write_bytes(whole + whole)
    assert keys_and_kinds(path)[1] == ["data_behind_end"], "two archives end to end: tar reads the first"
    path.write_bytes(whole + bytes(RECORD))
    assert keys_and_kinds(path)[1] == ["zero_filled_tail"]
    path.write_bytes(whole[: places[39] + 1024] + bytes(1024))
    assert keys_and_kinds(path) == ([f"{i:03d}" for i in range(40)], []), "an end without a full record is whole"


def shards(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        with tarfile.open(folder / f"part-{number:03d}.tar", "w") as tar:
            info = tarfile.TarInfo("0.json")
            info.size = len(row(number))
            tar.addfile(info, io.BytesIO(row(number)))
    return folder


def test_a_gap_in_the_numbers_is_told(tmp_path, cache, caplog, capsys):
    folder = shards(tmp_path / "s", [0, 1, 3, 6])
    dataset = open_dataset(str(folder), cache_dir=cache)
    assert len(dataset) == 4
    names = ", ".join(str(folder / f"part-{number:03d}.tar") for number in (2, 4, 5))
    assert f"shards are missing among the numbers: {names}" in caplog.text
    assert main(["verify", str(folder), "--cache_dir", str(cache)]) == 1
    assert "part-002.tar" in capsys.readouterr().out
    caplog.clear()
    open_dataset(str(shards(tmp_path / "t", [3, 4])), cache_dir=cache)
    assert "missing" not in caplog.text


@pytest.mark.parametrize("named", ["", "/*.tar", "/part-*.tar"])
def test_a_shard_that_an_earlier_list_had_is_missed(tmp_path, cache, caplog, capsys, named):
    folder = shards(tmp_path / "s", range(4))
    source = f"{folder}{named}"
    assert len(open_dataset(source, cache_dir=cache)) == 4
    (folder / "part-003.tar").unlink()
    assert len(open_dataset(source, cache_dir=cache)) == 3
    assert f"1 records that these shards held before are gone: {folder}/part-003.tar" in caplog.text
    assert main(["verify", source, "--cache_dir", str(cache)]) == 1
    printed = capsys.readouterr().out
    assert "part-003.tar: missing_shard" in printed and "1 of 1 records lost" in printed


def test_a_changed_id_or_meta_is_a_changed_record(tmp_path, cache, capsys):
    folder = shards(tmp_path / "s", [0, 1])
    command = ["verify", str(folder), "--cache_dir", str(cache)]
    assert main(command) == main(command) == 0
    for change in ({"id": "new"}, {"meta": {"by": "x"}}):
        data = json.dumps(json.loads(row(1)) | change).encode()
        with tarfile.open(folder / "part-001.tar", "w") as tar:
            info = tarfile.TarInfo("0.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        capsys.readouterr()
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert "changed_shard" in printed and "1 of 2 records lost: 0" in printed


def test_reading_by_offset_reads_what_was_scanned(tmp_path, cache):
    path = write(tmp_path / "a.tar", NAMES)
    reader = RecordReader(open_dataset(str(path), cache_dir=cache))
    assert [reader(number).prompt for number in range(len(NAMES))] == [f"q{n}" for n in range(len(NAMES))]
