"""Tar shards: one ``.json`` a record, named by a running number. And the scan that finds out what a shard holds.

One member a record, because members of a group of files can be taken for those of another record when a shard is
damaged; a key without dots, because webdataset takes everything behind the first dot for the extension.
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.records import (
    AnswerRecord,
    Record,
    RecordError,
    answers_of,
    content_hash,
    decode_record,
    prompt_hash,
    stable_hash,
    text_bytes,
)

TAR = (".tar", ".tar.gz", ".tgz")
BLOCK = 512
MAX_SOURCES = 256  # told apart in a corpus; what comes later is counted as one
END_OF_ARCHIVE = 2 * BLOCK  # zero bytes that must follow the last member

# What the index knows of a record. Lengths are UTF-8 bytes of text; an unpaired record has its answer on one side.
ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # of the JSON in its shard, in bytes
        ("size", "<u4"),
        ("crc", "<u4"),  # crc32 of the JSON: a read that differs is damage, or another shard
        ("key_start", "<i8"),  # the key is key_bytes[key_start : key_start + key_size]
        ("key_size", "<u4"),
        ("id", "<u8"),
        ("content", "<u8"),
        ("prompt", "<u8"),
        ("prompt_bytes", "<u4"),
        ("chosen_bytes", "<u4"),
        ("rejected_bytes", "<u4"),
        ("source", "<u4"),  # number of the record's meta.source in the manifest's list
    ]
)


@dataclass(frozen=True)
class Bad:
    """Something in a shard that is not a record, or is damage. ``key`` is empty for what concerns the whole shard."""

    kind: str
    key: str
    detail: str


@dataclass
class ShardScan:
    """What one shard holds: its usable records in order (``entries``, ``keys``) and what is wrong with it (``bad``)."""

    size: int
    sha256: str
    entries: np.ndarray
    keys: list[str]
    sources: list[str]
    bad: list[Bad] = field(default_factory=list)


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (key, JSON) members as a tar: the same bytes for the same members. Atomic: ``path`` is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in members:
            info = tarfile.TarInfo(f"{key}.json")
            info.size, info.mode = len(data), 0o444  # owner, group and time stay 0
            tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_gzip(path: Path, target: Path) -> str:
    """Decompress as much of ``path`` as is whole into ``target``. Returns what is wrong with the rest, or ''."""
    with gzip.open(path, "rb") as source, target.open("wb") as file:
        try:
            shutil.copyfileobj(source, file, 1 << 16)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return f"gzip stream ends early or is damaged: {error}"
    return ""


def scan_shard(path: Path) -> ShardScan:
    """Read a plain tar through, check every record, and find the damage that ``tarfile`` passes over in silence.

    ``tarfile`` takes a cut or overwritten header for the end of the archive. An archive that is whole ends in
    1,024 zero bytes, so whatever else stands after the last member is reported as ``no_end_of_archive``.
    """
    scan = ShardScan(path.stat().st_size, file_sha256(path), np.zeros(0, ENTRY), [], [])
    rows: list[tuple] = []
    seen: dict[str, set] = {"key": set(), "id": set()}
    end = 0
    with path.open("rb") as file:
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all: 1 kB a record
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if info.isreg():
                        file.seek(info.offset_data)
                        _scan_member(info, file.read(info.size), scan, rows, seen)
        except (tarfile.TarError, EOFError) as error:
            if scan.size:
                scan.bad.append(Bad("tar_error", "", f"{error}"))
        file.seek(end)
        tail = file.read(END_OF_ARCHIVE)
    if len(tail) < END_OF_ARCHIVE or tail.strip(b"\0"):
        scan.bad.append(Bad("no_end_of_archive", "", f"damaged or cut after byte {end} of {scan.size}"))
    scan.entries = np.array(rows, dtype=ENTRY)
    return scan


def _scan_member(info: tarfile.TarInfo, raw: bytes, scan: ShardScan, rows: list[tuple], seen: dict[str, set]) -> None:
    key, _, extension = info.name.partition(".")
    try:
        if extension != "json":
            raise RecordError("foreign_member", f"{info.name}: a record is one .json member whose key has no dot")
        if len(raw) < info.size:
            raise RecordError("truncated", f"{len(raw)} of {info.size} bytes are there")
        if key in seen["key"]:
            raise RecordError("duplicate_key", "the key stands in the shard twice; the first counts")
        record = decode_record(raw)
        if record.id in seen["id"]:
            raise RecordError(
                "duplicate_id", f"the record id {record.id!r} stands in the shard twice; the first counts"
            )
    except RecordError as error:
        scan.bad.append(Bad(error.kind, key, str(error)))
        return
    seen["key"].add(key)
    seen["id"].add(record.id)
    scan.keys.append(key)
    start = rows[-1][3] + rows[-1][4] if rows else 0
    place = (info.offset_data, len(raw), zlib.crc32(raw), start, len(key.encode("utf-8", "surrogateescape")))
    rows.append((*place, *describe(record, scan.sources)))


def source_family(record: Record) -> str:
    """What the source mix is counted by: ``meta.source`` up to its first colon (the item may stand behind it)."""
    return str(record.meta.get("source", "")).split(":")[0]


def describe(record: Record, sources: list[str]) -> tuple:
    """The entry fields from ``id`` on. ``sources`` is the list of source names met so far, appended to."""
    answers = [text_bytes(answer) for answer in answers_of(record)]
    if isinstance(record, AnswerRecord):
        answers = [answers[0], 0] if record.label else [0, answers[0]]
    name = source_family(record)
    if name not in sources and len(sources) < MAX_SOURCES:
        sources.append(name)
    elif name not in sources:
        name = sources[-1] = "(other)"
    hashes = (stable_hash(record.id), content_hash(record), prompt_hash(record))
    return (*hashes, text_bytes(record.prompt), *answers, sources.index(name))


def pack_bad(bad: Iterable[Bad], shard: str) -> list[dict]:
    """For the manifest."""
    return [{"shard": shard, "kind": b.kind, "key": b.key, "detail": b.detail} for b in bad]


def to_json(data: object) -> bytes:
    """Stable JSON for manifests: readable, sorted, the same bytes for the same data. What is no Unicode (a file name
    in another encoding) is escaped."""
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
