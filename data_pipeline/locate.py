"""From what a user names to an index: a built folder, shards, or anything that is built into the cache first."""

import hashlib
import json
import logging
import os
from dataclasses import replace
from glob import glob
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock

from data_pipeline.errors import DataError
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
from data_pipeline.parallel import ordered_map
from data_pipeline.remote import AbsentError, cached_file, expand_remote, is_glob, is_remote
from data_pipeline.shard_builder import BuildOptions, build, check_first_rows, job_signature
from data_pipeline.shards import TAR, Bad, ShardScan, scan_shard
from data_pipeline.sources.files import SourceOptions, named_split, refuse_split

log = logging.getLogger(__name__)

LARGE = 32 << 20  # bytes of input from which several processes pay


def open_index(
    source: str, cache: Path, options: BuildOptions, split: str, workers: int | None, progress: bool
) -> tuple[Index, bool]:
    """(index, whether the source itself holds a train/eval split)."""
    ready = _ready(source, cache, split, workers)
    if ready is None:
        return _build_cached(expand(source), cache, options, workers, progress), False
    refuse_split(source, options.source)
    return ready


def _ready(source: str, cache: Path, split: str, workers: int | None) -> tuple[Index, bool] | None:
    """The same of a folder made by ``build`` and of shards; None for what has to be built first."""
    if is_remote(source) and not source.endswith(TAR):
        is_file = Path(source).suffix and not source.endswith("/")
        return None if is_file else _remote_folder(source.rstrip("/"), cache, split)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / MANIFEST).exists():
            return load_index(path.resolve()), False
        if (path / split / MANIFEST).exists():
            return load_index((path / split).resolve()), True
        if shards := [str(p.resolve()) for p in path.iterdir() if p.name.endswith(TAR)]:
            return _index_shards(sorted(shards), cache, workers), False
    if shards := [name for name in expand(source) if name.endswith(TAR)]:
        return _built_index(shards) or _index_shards(shards, cache, workers), False
    return None


def open_side(source: str, cache: Path, split: str) -> Index | None:
    """One side of a folder built with a split; None where it has been taken away."""
    if is_remote(source):
        url = source.rstrip("/")
        try:
            cached_file(f"{url}/{split}/{MANIFEST}", cache, fresh=True)
        except AbsentError:
            return None
        return _remote_folder(url, cache, split)[0]
    side = Path(source).expanduser() / split
    return load_index(side.resolve()) if (side / MANIFEST).exists() else None


def check_rows(source: str) -> None:
    """DataError for what is wrong in the first rows of local files, so that it shows before anything slow is begun.
    Shards, folders and what has to be fetched are looked at when they are opened."""
    files = [] if is_remote(source) else expand(source)
    if files and all(Path(name).is_file() and not name.endswith(TAR) for name in files):
        check_first_rows(files, BuildOptions())


def expand(pattern: str) -> list[str]:
    """What a brace list with globs stands for: URLs and absolute paths, sorted. A plain name stands for itself."""
    path = Path(pattern).expanduser()
    if not is_remote(pattern) and path.exists():
        return [str(path.resolve())]
    folder = Path(named_split(pattern, SourceOptions())[0]).expanduser()
    if folder.exists() or not (is_glob(pattern) or "{" in pattern or pattern.endswith(TAR)):
        return [pattern]
    found: list[str] = []
    for name in braceexpand(pattern):
        if is_remote(name):
            found += expand_remote(name) if is_glob(name) else [name]
        else:
            found += _glob(name)
    return sorted(set(found))


def _glob(name: str) -> list[str]:
    paths = [str(Path(path).resolve()) for path in glob(str(Path(name).expanduser()))]
    if not paths:
        raise DataError(f"{name} matches no file" if is_glob(name) else f"{name} does not exist")
    return paths


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
    if dropped := index.manifest["provenance"]["report"]["dropped"]:
        kinds = ", ".join(f"{kind} {item['count']}" for kind, item in dropped.items())
        _warn(f"{', '.join(files)}: {len(index)} records; dropped: {kinds}")
    return index


def _warn(message: str) -> None:
    """Once for all ranks of a run: they all open the same data."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", message)


def _workers(files: list[str], asked: int | None) -> int:
    """Processes for a job: starting them takes longer than a small job itself."""
    if asked is not None:
        return asked
    size = sum(Path(file).stat().st_size for file in files if Path(file).is_file())
    return len(os.sched_getaffinity(0)) if size > LARGE else 0


def _index_shards(urls: list[str], cache: Path, workers: int | None) -> Index:
    """The index of shards that have none of their own, made once and kept in the cache.

    When they have changed since it was made, they are indexed anew and compared with it: what it knew and is not there
    now is told, and kept as ``gone`` in the new manifest.
    """
    stamps = []
    for url in urls:
        status = None if is_remote(url) else Path(url).stat()
        stamps.append([url, status and status.st_size, status and status.st_mtime_ns])
    digest, names = (hashlib.blake2b(json.dumps(of).encode(), digest_size=8).hexdigest() for of in (stamps, urls))
    folder = cache / "index" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    last = folder.with_name(f"{names}.last")  # the digest of the last index of these names in which nothing was gone
    with FileLock(f"{folder}.lock"):
        fresh = not (folder / MANIFEST).exists()
        if fresh:
            scans = list(ordered_map(_scan_url, [(url, cache) for url in urls], workers=_workers(urls, workers)))
            manifest, entries, keys = merge_scans(urls, scans)
            if not len(entries):
                raise DataError(f"no usable record in {len(urls)} shards: {bad_summary(manifest['bad'])}")
            earlier = last.read_text() if last.exists() else ""
            manifest["gone"] = _gone(folder.with_name(earlier), entries) if earlier else None
            publish(folder, lambda partial: save_index(partial, manifest, entries, keys))
        index = replace(load_index(folder), fresh=fresh)
        if not index.manifest.get("gone"):  # else the index that knows more is compared with again
            partial = last.with_name(f"{last.name}.{os.getpid()}.partial")
            partial.write_text(digest)
            partial.replace(last)
    if fresh and (gone := index.manifest["gone"]):
        _warn(f"{sum(map(len, gone.values()))} records that these shards held before are gone: {', '.join(gone)}")
    if index.manifest["bad"]:
        _warn(bad_summary(index.manifest["bad"]))
    return index


def _gone(folder: Path, entries: np.ndarray) -> dict[str, list[str]] | None:
    """{shard: keys} of the records of an earlier index that are not among ``entries``; None without such an index."""
    try:
        earlier = load_index(folder)
    except DataError:
        return None
    gone: dict[str, list[str]] = {}
    for row in np.flatnonzero(~np.isin(earlier.entries["content"], entries["content"])).tolist():
        gone.setdefault(earlier.url(earlier.shard_of(row)), []).append(earlier.key(row))
    return gone


def _scan_url(job: tuple[str, Path]) -> ShardScan:
    path, fault = plain_tar(job[0], job[1])
    scan = scan_shard(path)
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
