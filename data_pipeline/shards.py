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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.endings import other_content
from data_pipeline.files import whole_or_absent
from data_pipeline.members import Bad, Member, read_members
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
MAX_SOURCES = 256  # told apart in a corpus; what comes later is counted as one

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


@dataclass
class ShardScan:
    """What one shard holds: its usable records in order (``entries``, ``keys``) and what is wrong with it (``bad``)."""

    size: int
    sha256: str
    entries: np.ndarray
    keys: list[str]
    sources: list[str]
    bad: list[Bad] = field(default_factory=list)
    told: Counter = field(default_factory=Counter)


Read = Callable[[bytes, Counter], Record]
"""A record from the JSON of a member; counts in the second argument what the user is to be told of."""


def read_stored(raw: bytes, told: Counter | None = None) -> Record:
    """A record as ``build`` stored it: there is nothing to tell."""
    return decode_record(raw)


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (key, JSON) members as a tar: the same bytes for the same members. Atomic: ``path`` is whole or absent."""
    with (
        whole_or_absent(path) as partial,
        partial.open("wb") as raw,
        tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, data in members:
            info = tarfile.TarInfo(f"{key}.json")
            info.size, info.mode = len(data), 0o444  # owner, group and time stay 0
            tar.addfile(info, io.BytesIO(data))


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_gzip(path: Path, target: Path) -> str:
    """Decompress as much of ``path`` as is whole into ``target``. Returns what is wrong with the rest, or ''."""
    if fault := other_content(path):
        target.write_bytes(b"")
        return fault
    with gzip.open(path, "rb") as source, target.open("wb") as file:
        try:
            shutil.copyfileobj(source, file, 1 << 16)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return f"gzip stream ends early or is damaged: {error}"
    return ""


def scan_shard(path: Path, read: Read = read_stored) -> ShardScan:
    """Read a plain tar through and check every record, with ``read`` from its JSON; what is none is ``bad``."""
    scan = ShardScan(path.stat().st_size, file_sha256(path), np.zeros(0, ENTRY), [], [])
    rows: list[tuple] = []
    seen: dict[str, set] = {"key": set(), "id": set()}
    for item in read_members(path):
        if isinstance(item, Bad):
            scan.bad.append(item)
        else:
            _scan_member(item, read, scan, rows, seen)
    scan.entries = np.array(rows, dtype=ENTRY)
    return scan


def _scan_member(member: Member, read: Read, scan: ShardScan, rows: list[tuple], seen: dict[str, set]) -> None:
    key, raw = member.key, member.raw
    try:
        if key in seen["key"]:
            raise RecordError("duplicate_key", "the key stands in the shard twice; the first counts")
        record = read(raw, scan.told)
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
    place = (member.offset, len(raw), zlib.crc32(raw), start, len(key.encode("utf-8", "surrogateescape")))
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
