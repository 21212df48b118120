"""The index of a set of shards: where every usable record lies, and what is known of it, found once before training.

On disk, a folder: ``manifest.json`` (schema, shards with sizes and sha256, counts, provenance, statistics),
``entries.npy`` (one ``shards.ENTRY`` a record) and ``keys.npy`` (the bytes of all keys). The arrays are memory-mapped:
they cost 68 bytes and a key a record on disk, shared by all processes of a machine, and load in no time.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import whole_or_absent, write_whole
from data_pipeline.identity import content_digest
from data_pipeline.members import Bad
from data_pipeline.remote import cached_file, default_cache_dir, is_remote
from data_pipeline.shards import ENTRY, ShardScan, file_sha256, pack_bad, to_json, unpack_gzip

SCHEMA = 1
GZIP = (".gz", ".tgz")
MANIFEST, ENTRIES, KEYS = "manifest.json", "entries.npy", "keys.npy"
DIGEST = "digest"  # the manifest's own
MANIFEST_FIELDS = {"num_records", "shards", "sources", "bad", "fingerprint"}


@dataclass(frozen=True)
class Index:
    """An index in memory. ``base`` is the folder or URL that relative shard names are resolved against.

    ``fresh``: it was made just now of shards that had none, so it knows nothing of what was lost before.
    """

    base: str
    manifest: dict
    entries: np.ndarray  # [num_records] of ENTRY
    key_bytes: np.ndarray  # uint8
    starts: np.ndarray  # [num_shards + 1]: shard s holds the records starts[s] : starts[s + 1]
    fresh: bool = False

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the ids and contents of all records in order (not of file names or of the sharding)."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, record: int) -> str:
        """The key of a record: its member's name without ``.json``."""
        entry = self.entries[record]
        start = int(entry["key_start"])
        return self.key_bytes[start : start + int(entry["key_size"])].tobytes().decode("utf-8", "surrogateescape")

    def shard_of(self, record: int) -> int:
        """The shard in which a record lies."""
        return int(np.searchsorted(self.starts, record, side="right")) - 1

    def url(self, shard: int) -> str:
        """Path or URL of a shard."""
        name = self.manifest["shards"][shard]["name"]
        return name if is_remote(name) or os.path.isabs(name) else f"{self.base.rstrip('/')}/{name}"

    def local_shard(self, shard: int, cache_dir: Path | None) -> Path:
        """A shard as a plain tar on this machine: fetched and unpacked into the cache where need be."""
        known, url = self.manifest["shards"][shard], self.url(shard)
        size = None if url.lower().endswith(GZIP) else known["bytes"]  # bytes are unpacked
        version = "" if is_remote(known["name"]) else known["sha256"]  # full names: indexed from the cached copy
        return plain_tar(url, cache_dir, size=size, version=version)[0]


def plain_tar(url: str, cache_dir: Path | None, *, size: int | None = None, version: str = "") -> tuple[Path, str]:
    """(path of the uncompressed tar on this machine, what is wrong with its compression or '')."""
    path = cached_file(url, cache_dir, size=size, version=version) if is_remote(url) else Path(url)
    if not path.name.lower().endswith(GZIP):
        return path, ""
    key = hashlib.blake2b(f"{url} {content_digest(path, cache_dir)}".encode(), digest_size=8).hexdigest()
    target = (cache_dir or default_cache_dir()) / "unpacked" / key / "shard.tar"
    note = target.with_name("fault.txt")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(target) as partial:
            write_whole(note, unpack_gzip(path, partial).encode())
    return target, note.read_text()


def load_index(folder: str | Path, *, base: str | None = None) -> Index:
    """Load the index in ``folder``. Raises DataError when it is none, is of another schema, is not what was written, or
    does not fit together."""
    path = Path(folder)
    manifest = _load_manifest(path)
    try:
        _check_sums(path, manifest)
        entries = np.load(path / ENTRIES, mmap_mode="r")
        keys = np.load(path / KEYS, mmap_mode="r") if (path / KEYS).stat().st_size > 128 else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the index is damaged ({error}); build the folder again") from error
    starts = np.concatenate([[0], np.cumsum([shard["records"] for shard in manifest["shards"]])]).astype(np.int64)
    if entries.dtype != ENTRY or len(entries) != starts[-1] or len(entries) != manifest["num_records"]:
        raise DataError(f"{path}: {ENTRIES} and {MANIFEST} do not belong together; build the folder again")
    return Index(base or str(path), manifest, entries, keys, starts)


def _load_manifest(path: Path) -> dict:
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError as error:
        raise DataError(f"{path} holds no {MANIFEST}: not a folder made by `python -m data_pipeline build`") from error
    except ValueError as error:
        raise DataError(f"{path / MANIFEST} is not valid JSON: {error}; build the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{path / MANIFEST} has schema {found!r}, this version reads {SCHEMA}; build the folder again")
    if missing := MANIFEST_FIELDS - manifest.keys():
        raise DataError(f"{path / MANIFEST} lacks {', '.join(sorted(missing))}; build the folder again")
    signed = DIGEST in manifest or "checksums" in manifest  # those of earlier versions are not
    if signed and (manifest.get(DIGEST) != manifest_digest(manifest) or raw != to_json(manifest)):
        raise DataError(
            f"{path / MANIFEST}: the index is damaged (it is not as it was written); build the folder again"
        )
    return manifest


def _check_sums(path: Path, manifest: dict) -> None:
    """ValueError for an index file that is not as it was written. Indices of earlier versions have no checksums."""
    for name, known in manifest.get("checksums", {}).items():
        if file_sha256(path / name) != known:
            raise ValueError(f"{name} is not as it was written")


def merge_scans(names: Sequence[str], scans: Iterable[ShardScan]) -> tuple[dict, np.ndarray, np.ndarray]:
    """(manifest, entries, key bytes) of scanned shards. A record id that stands in two shards counts once."""
    scans = list(scans)
    sources: list[str] = []
    parts, keys, bad, key_base = [], [], [], 0
    for name, scan in zip(names, scans, strict=True):
        entries = scan.entries.copy()
        entries["key_start"] += key_base
        keys.append("".join(scan.keys).encode("utf-8", "surrogateescape"))
        key_base += len(keys[-1])
        sources += [source for source in scan.sources if source not in sources]
        numbers = np.array([sources.index(source) for source in scan.sources] or [0], np.uint32)
        entries["source"] = numbers[entries["source"]]
        parts.append(entries)
        bad += pack_bad(scan.bad, name)
    entries = np.concatenate(parts) if parts else np.zeros(0, ENTRY)
    key_bytes = np.frombuffer(b"".join(keys), np.uint8)
    counts = np.array([len(part) for part in parts], np.int64)
    entries, counts, repeated = _unique_ids(entries, counts)
    for shard, place in repeated:
        bad += pack_bad(
            [Bad("duplicate_id", scans[shard].keys[place], "the id stands in an earlier shard")], names[shard]
        )
    shards = [
        {"name": name, "bytes": scan.size, "sha256": scan.sha256, "records": int(count)}
        for name, scan, count in zip(names, scans, counts, strict=True)
    ]
    manifest = {"schema": SCHEMA, "num_records": len(entries), "shards": shards, "sources": sources, "bad": bad}
    return manifest | {"fingerprint": fingerprint(entries)}, entries, key_bytes


def _unique_ids(entries: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Entries and counts per shard without later entries of an id met before, and the (shard, place) of those."""
    first = np.unique(entries["id"], return_index=True)[1]
    if len(first) == len(entries):
        return entries, counts, []
    keep = np.zeros(len(entries), bool)
    keep[first] = True
    shard = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(entries)) - np.repeat(np.cumsum(counts) - counts, counts)
    repeated = [(int(shard[i]), int(place[i])) for i in np.flatnonzero(~keep)]
    return entries[keep], np.bincount(shard[keep], minlength=len(counts)), repeated


def fingerprint(entries: np.ndarray) -> str:
    """16 hex digits of the ids and contents in order."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("id", "content"):
        digest.update(np.ascontiguousarray(entries[name]).tobytes())
    return digest.hexdigest()


def save_index(folder: Path, manifest: dict, entries: np.ndarray, key_bytes: np.ndarray) -> dict:
    """Write the index files into a folder and return the manifest as written, with checksums. It comes last: a folder
    without it is not an index."""
    for name, array in ((ENTRIES, entries), (KEYS, key_bytes)):
        with whole_or_absent(folder / name) as partial, partial.open("wb") as file:
            np.save(file, array)
    checksums = {name: file_sha256(folder / name) for name in (ENTRIES, KEYS)}
    return save_manifest(folder, manifest | {"checksums": checksums})


def save_manifest(folder: Path, manifest: dict) -> dict:
    """Write a manifest with a checksum of its own, and return it as written."""
    signed = manifest | {DIGEST: manifest_digest(manifest)}
    write_whole(folder / MANIFEST, to_json(signed))
    return signed


def manifest_digest(manifest: dict) -> str:
    """16 hex digits of all of a manifest but this."""
    rest = {name: value for name, value in manifest.items() if name != DIGEST}
    return hashlib.blake2b(to_json(rest), digest_size=8).hexdigest()


def publish(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a fresh folder beside ``target`` and rename it there, whole or not at all.

    When another process was faster, its folder stays: both are made from the same input.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        partial.rename(target)
    except OSError:
        if not (target / MANIFEST).exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def bad_summary(bad: list[dict]) -> str:
    """One line: how many of which kind, with the first as an example."""
    if not bad:
        return "nothing is in them"
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(item["kind"] for item in bad).items()))
    first = bad[0]
    where = Path(first["shard"]).name + (f", key {first['key']}" if first["key"] else "")
    return f"{len(bad)} unusable: {kinds}; first: {where}: {first['detail']}"
