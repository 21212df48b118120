"""A file that is not what its name says is refused with what it is and what to do."""

import gzip
import io
import json
import tarfile

import pytest

from data_pipeline.endings import other_content
from data_pipeline.errors import DataError
from data_pipeline.shard_builder import BuildOptions, build

LINE = json.dumps({"prompt": "2+3?", "chosen": "5", "rejected": "6"}).encode() + b"\n"


def tar_of(name, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(LINE)
        tar.addfile(info, io.BytesIO(LINE))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", gzip.compress(LINE), "gzip, not what its ending says; name it .gz"),
        ("x.jsonl.gz", LINE, "not compressed; take .gz off"),
        ("x.tar", tar_of("0.json", "w:gz"), "gzip, not what its ending says; name it .gz"),
        ("x.tar.gz", tar_of("0.json"), "not compressed; take .gz off"),
        ("x.tar", tar_of("0.json", "w:xz"), "xz, not what its ending says; unpack it"),
        ("x.jsonl", LINE.decode().encode("utf-16"), "save it as UTF-8"),
        ("x.csv", b"PK\x03\x04....", "zip, not what its ending says; unpack it"),
        ("x.json", b"PAR1....", "name it .parquet"),
    ],
    ids=["gzip", "plain as gz", "tar in gzip", "tar as gz", "tar in xz", "utf-16", "zip", "parquet"],
)
def test_content_of_another_kind(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in other_content(tmp_path / name)
    with pytest.raises(DataError, match=message):
        build([str(tmp_path / name)], tmp_path / "out", BuildOptions(), workers=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.jsonl", LINE), ("x.jsonl.gz", gzip.compress(LINE)), ("x.tar", tar_of("PAR1/0.json")), ("x.jsonl", b"")],
    ids=["plain", "gzip", "tar", "empty"],
)
def test_content_that_its_ending_says(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert other_content(tmp_path / name) == ""
