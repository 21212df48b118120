"""From what a user names to an index: a built folder, shards, or anything that is built into the cache first."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from data_pipeline.addresses import hidden
from data_pipeline.convert import CONVERSION, ConvertOptions, told_in_a_line
from data_pipeline.errors import DataError
from data_pipeline.files import write_whole
from data_pipeline.identity import content_digest
from data_pipeline.index import (
    ENTRIES,
    KEYS,
    MANIFEST,
    Index,
    bad_summary,
    load_index,
    merge_scans,
    plain_tar,
    publish,
    save_index,
)
from data_pipeline.members import Bad
from data_pipeline.parallel import ordered_map
from data_pipeline.remote import AbsentError, cached_file, is_remote
from data_pipeline.shard_builder import BuildOptions, build, check_first_rows, job_signature
from data_pipeline.shards import ShardScan, scan_shard
from data_pipeline.source import Kind, Source, parse_source
from data_pipeline.sources.columns import parse_columns
from data_pipeline.sources.files import refuse_split
from data_pipeline.sources.formats import TO_BE_BUILT, RowOptions, RowReader

log = logging.getLogger(__name__)

RUNNING_NUMBER = re.compile(r"(.*?)(\d+)([^\d/]*)")
MOST_NUMBERS = 100_000  # numbers further apart are no running ones but dates and the like
LARGE = 32 << 20  # bytes of input from which several processes pay


def open_index(
    source: Source, cache: Path, options: BuildOptions, split: str, workers: int | None, progress: bool
) -> tuple[Index, bool]:
    """(index, whether the source itself holds a train/eval split)."""
    places = list(source.places)
    if source.kind is Kind.ROWS:
        return _build_cached(places, cache, options, workers, progress), False
    if source.kind is Kind.SHARDS:
        index = _built_index(places) or _index_shards(places, source.key, cache, options, workers)
        if index is None:
            return _build_cached(places, cache, options, workers, progress), False
        ready = index, False
    elif source.kind is Kind.REMOTE:
        ready = _remote_folder(places[0], cache, split)
    else:
        own_split = source.kind is Kind.SPLIT
        ready = load_index(Path(places[0], split) if own_split else places[0]), own_split
    refuse_split(source.name, options.source)
    return ready


def open_side(source: Source, cache: Path, split: str) -> Index | None:
    """One side of a folder built with a split; None where it has been taken away."""
    (folder,) = source.places
    if source.kind is Kind.REMOTE:
        try:
            cached_file(f"{folder}/{split}/{MANIFEST}", cache, fresh=True)
        except AbsentError:
            return None
        return _remote_folder(folder, cache, split)[0]
    return load_index(Path(folder, split)) if Path(folder, split, MANIFEST).exists() else None


def check_rows(name: str, columns: str | None = None) -> None:
    """DataError for what is wrong in the first rows of local files, so that it shows before anything slow is begun.
    Shards, folders and what has to be fetched are looked at when they are opened."""
    if is_remote(name) or (source := parse_source(name)).kind is not Kind.ROWS:
        return
    if all(Path(file).is_file() for file in source.places):
        check_first_rows(source.places, BuildOptions(convert=ConvertOptions(columns=parse_columns(columns))))


def _built_index(shards: list[str]) -> Index | None:
    """The index that lies beside the shards, when they are just the ones it knows."""
    folder = Path(shards[0]).parent
    if is_remote(shards[0]) or not (folder / MANIFEST).exists():
        return None
    index = load_index(folder)
    return index if shards == sorted(index.url(s) for s in range(len(index.starts) - 1)) else None


def _build_cached(files: list[str], cache: Path, options: BuildOptions, workers: int | None, progress: bool) -> Index:
    digest = hashlib.blake2b(job_signature(files, options).encode(), digest_size=8).hexdigest()
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(files[0]).name.split(".")[0])[:40]
    folder = cache / "built" / f"{name}-{digest}"
    if not (folder / MANIFEST).exists():
        build(files, folder, options, workers=_workers(files, workers), progress=progress)
    index = load_index(folder)
    report = index.manifest["provenance"]["report"]
    if dropped := report["dropped"]:
        kinds = ", ".join(f"{kind} {item['count']}" for kind, item in dropped.items())
        first = next((item["examples"][0] for item in dropped.values() if item["examples"]), "")
        _warn(f"{', '.join(files)}: {len(index)} records; dropped: {kinds}" + (f" (first: {first})" if first else ""))
    if told := told_in_a_line(report["told"]):
        _warn(f"{', '.join(files)}: {told}")
    return index


def _warn(message: str) -> None:
    """Once for all ranks of a run: they all open the same data."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", hidden(message))


def _workers(files: list[str], asked: int | None) -> int:
    """Processes for a job: starting them takes longer than a small job itself."""
    if asked is not None:
        return asked
    size = sum(Path(file).stat().st_size for file in files if Path(file).is_file())
    return len(os.sched_getaffinity(0)) if size > LARGE else 0


def _index_shards(urls: list[str], key: str, cache: Path, options: BuildOptions, workers: int | None) -> Index | None:
    """The index of shards that have none of their own, made once and kept in the cache; None where their rows have to
    be gathered by question, or make several records each, so that they must be built.

    When they have changed since it was made, they are indexed anew and compared with it: what it knew and is not there
    now is told, and kept as ``gone`` in the new manifest. So is a number that is left out among the shards' names.
    """
    reading = {"format": options.convert.format, "columns": options.convert.columns}
    stamps = [[url, None if is_remote(url) else content_digest(Path(url), cache)] for url in urls]
    digest, kept = (_digest([of, reading, CONVERSION]) for of in (stamps, key))
    folder = cache / "index" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    last = folder.with_name(f"{kept}.last")  # the digest of the last index of this source in which nothing was gone
    with FileLock(f"{folder}.lock"):
        fresh = not (folder / MANIFEST).exists()
        if fresh:
            jobs = [(url, cache, _row_options(options)) for url in urls]
            scans = list(ordered_map(_scan_url, jobs, workers=_workers(urls, workers)))
            manifest, entries, keys = merge_scans([hidden(url) for url in urls], scans)
            if any(item["kind"] == TO_BE_BUILT for item in manifest["bad"]):
                return None
            if not len(entries):
                raise DataError(f"no usable record in {len(urls)} shards: {bad_summary(manifest['bad'])}")
            earlier = last.read_text() if last.exists() else ""
            told = sum((scan.told for scan in scans), Counter())
            manifest |= {"reading": reading, "told": dict(told), "gaps": number_gaps([hidden(url) for url in urls])}
            manifest["gone"] = _gone(folder.with_name(earlier), entries) if earlier else None
            publish(folder, lambda partial: save_index(partial, manifest, entries, keys))
        index = replace(load_index(folder), fresh=fresh)
        for shard, url in zip(index.manifest["shards"], urls, strict=True):
            shard["name"] = url  # with what it takes to read it, which is in no file
        if not index.manifest.get("gone"):  # else the index that knows more is compared with again
            write_whole(last, digest.encode())
    _tell(index)
    return index


def _tell(index: Index) -> None:
    """Warn of what is not as it was, of what cannot be used and of what is not read."""
    manifest = index.manifest
    if index.fresh and (gone := manifest["gone"]):
        _warn(f"{sum(map(len, gone.values()))} records that these shards held before are gone: {', '.join(gone)}")
    if gaps := manifest["gaps"]:
        _warn(f"shards are missing among the numbers: {in_a_list(gaps)}")
    if manifest["bad"]:
        _warn(bad_summary(manifest["bad"]))
    if told := told_in_a_line(manifest["told"]):
        _warn(f"{index.base if len(manifest['shards']) > 1 else index.url(0)}: {told}")


def _digest(data: object) -> str:
    return hashlib.blake2b(json.dumps(data).encode(), digest_size=8).hexdigest()


def _row_options(options: BuildOptions) -> RowOptions:
    return RowOptions(options.convert.format, options.convert.pairing, options.convert.columns)


def _gone(folder: Path, entries: np.ndarray) -> dict[str, list[str]] | None:
    """{shard: keys} of the records of an earlier index that are not among ``entries`` to the byte, id and meta too;
    None without such an index."""
    try:
        earlier = load_index(folder)
    except DataError:
        return None
    there, before = (
        of["content"] ^ (of["crc"].astype(np.uint64) << np.uint64(32)) for of in (entries, earlier.entries)
    )
    gone: dict[str, list[str]] = {}
    for row in np.flatnonzero(~np.isin(before, there)).tolist():
        gone.setdefault(earlier.url(earlier.shard_of(row)), []).append(earlier.key(row))
    return gone


def number_gaps(urls: Sequence[str]) -> list[str]:
    """The names that are left out among shards that differ in a running number alone, such as shard-00003.tar between
    shard-00002.tar and shard-00004.tar."""
    numbers: dict[tuple[str, str], dict[int, str]] = {}
    for url in urls:
        if found := RUNNING_NUMBER.fullmatch(url):
            before, digits, behind = found.groups()
            numbers.setdefault((before, behind), {})[int(digits)] = digits
    gaps = []
    for (before, behind), there in numbers.items():
        width = min(map(len, there.values()))
        absent = (
            sorted(set(range(min(there), max(there))) - set(there)) if max(there) - min(there) < MOST_NUMBERS else []
        )
        gaps += [f"{before}{number:0{width}d}{behind}" for number in absent]
    return gaps


def in_a_list(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _scan_url(job: tuple[str, Path, RowOptions]) -> ShardScan:
    path, fault = plain_tar(job[0], job[1])
    scan = scan_shard(path, RowReader(job[2]))
    if fault:
        scan.bad.insert(0, Bad("damaged_gzip", "", fault))
    return scan


def _remote_folder(url: str, cache: Path, split: str) -> tuple[Index, bool]:
    """The index files of a folder behind a URL; shards are fetched when they are read. The manifest is always fresh."""
    error: DataError | None = None
    for base, own_split in ((url, False), (f"{url}/{split}", True)):
        try:
            manifest = cached_file(f"{base}/{MANIFEST}", cache, fresh=True)
        except DataError as failure:
            error = error or failure
            continue
        digest = hashlib.blake2b(manifest.read_bytes() + base.encode(), digest_size=8).hexdigest()
        folder = cache / "index" / digest
        if not (folder / MANIFEST).exists():
            fetched = [cached_file(f"{base}/{name}", cache, fresh=True) for name in (ENTRIES, KEYS)]

            def copy(partial: Path, files: tuple[Path, ...] = (*fetched, manifest)) -> None:
                for file in files:
                    (partial / file.name).write_bytes(file.read_bytes())

            publish(folder, copy)
        return load_index(folder, base=base), own_split
    raise DataError(f"{url} is no folder made by `python -m data_pipeline build`: {error}")
