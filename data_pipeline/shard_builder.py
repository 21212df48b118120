"""``build``: any source → shards with an index. In two parallel passes over chunks, atomic and resumable.

1. convert: rows → records, checked; a chunk of rows becomes a chunk file of stored records and an array of hashes.
2. write: duplicates are dropped over the whole corpus, prompts are dealt to train and eval, records to shards.

Everything happens in ``OUT.building``; OUT appears by one rename when all is done, so a reader never sees half of it. A
chunk or shard that is complete in ``OUT.building`` is not made again when an interrupted build is repeated.
"""

import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from filelock import FileLock, Timeout

from data_pipeline.addresses import hidden
from data_pipeline.convert import CONVERSION, HASHES, ConvertJob, ConvertOptions, Dropped, convert_chunk, convert_rows
from data_pipeline.errors import DataError
from data_pipeline.files import write_whole
from data_pipeline.identity import content_digest
from data_pipeline.index import MANIFEST, SCHEMA, Index, load_index, merge_scans, save_index
from data_pipeline.parallel import chunks, ordered_map
from data_pipeline.progress import OFTEN_QUICK, bar_of
from data_pipeline.records import RecordError
from data_pipeline.remote import is_remote
from data_pipeline.shards import ShardScan, scan_shard, write_shard
from data_pipeline.sources.candidates import add_long_row, is_long
from data_pipeline.sources.columns import Columns, Fields
from data_pipeline.sources.files import (
    Row,
    RowSource,
    SourceOptions,
    parts_of_folder,
    read_rows,
    row_source,
    source_files,
)
from data_pipeline.split import eval_mask

log = logging.getLogger(__name__)

SKIP = "shard it with python -m data_pipeline build --on_error skip"
ROWS_PER_CHUNK = 2000


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides what a build makes. ``workers`` and ``progress`` do not change the result.

    ``shard_size``: records a shard. ``shuffle_seed``: order of the records on disk (None: as in the source).
    ``on_error``: ``raise`` at the first malformed row, or ``skip`` and count. ``limit``: rows read (0: all).
    """

    shard_size: int = 10_000
    shuffle_seed: int | None = None
    eval_fraction: float = 0.0
    on_error: str = "raise"
    limit: int = 0
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    source: SourceOptions = field(default_factory=SourceOptions)

    def __post_init__(self):
        if self.shard_size < 1:
            raise DataError(f"shard_size is {self.shard_size}; it must be at least 1")
        if not 0 <= self.eval_fraction < 1:
            raise DataError(f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1")
        if self.on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {self.on_error!r}; allowed: raise, skip")
        if self.limit < 0:
            raise DataError(f"limit is {self.limit}; it must be at least 0 (0: no limit)")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise DataError(f"shuffle_seed is {self.shuffle_seed}; it must be at least 0")


def build(
    sources: Sequence[str], out: Path, options: BuildOptions, *, workers: int = 0, progress: bool = False
) -> dict:
    """Build ``out`` from ``sources`` and return its manifest (of the train split, when there are two).

    Nothing happens when ``out`` was built from the same input with the same options. Raises DataError for anything
    wrong with the input, naming file and line, and when ``out`` is something else.
    """
    out = Path(out)
    if not out.name or out.name == "..":
        raise DataError(f"out is {str(out)!r}; give the folder to make a name of its own, such as shards")
    out.parent.mkdir(parents=True, exist_ok=True)
    signature = job_signature(sources, options)
    with _one_at_a_time(out):
        if (done := _built(out, signature)) is not None:
            return done
        work = out.with_name(out.name + ".building")
        _prepare(work, signature)
        with _kept_or_removed(work):
            dropped, rows = _convert(sources, work, options, workers, progress)
            manifest = _write(work, options, dropped, rows, json.loads(signature), workers, progress)
            (work / "result").rename(out)
        shutil.rmtree(work)
    return manifest


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    lock = FileLock(out.parent / f".{out.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.warning("%s is being built by another process: waiting for it", out)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _kept_or_removed(work: Path) -> Iterator[None]:
    """A build that fails for its input will not be repeated with the same input: its work goes. What was interrupted
    or met a full disk can go on, so its work stays, and the user is told."""
    again = f"what is finished stays in {work}: the same command goes on there; or remove it"
    try:
        yield
    except DataError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        reason = str(error) if error.errno or isinstance(error, ChildProcessError) else f"{error} (is the disk full?)"
        raise DataError(f"the build stopped: {reason}; {again}") from error
    except KeyboardInterrupt:
        log.warning("the build was interrupted; %s", again)
        raise


def job_signature(sources: Sequence[str], options: BuildOptions) -> str:
    """What a build is made from, as JSON: equal signatures give equal shards. Files count by their content."""
    files = []
    for source in sources:
        path = row_source(source, options.source).path
        for file in source_files(path) if path else []:
            files.append([str(file.resolve()), content_digest(file, options.source.cache_dir)])
    chosen = asdict(options)
    chosen["source"].pop("cache_dir")
    job = {
        "schema": SCHEMA,
        "conversion": CONVERSION,
        "sources": [hidden(source) for source in sources],
        "files": files,
        "options": chosen,
    }
    return json.dumps(job, sort_keys=True)


def _built(out: Path, signature: str) -> dict | None:
    if not out.exists():
        return None
    for folder in (out, out / "train"):
        if (folder / MANIFEST).exists():
            index = load_index(folder)
            if index.manifest.get("provenance", {}).get("job") == json.loads(signature):
                _refuse_lost_shards(out, [index, *([load_index(out / "eval")] if folder != out else [])])
                return index.manifest
    raise DataError(
        f"{out} exists and was not built from this input with these options; remove it or choose another --out"
    )


def _refuse_lost_shards(out: Path, indices: Sequence[Index]) -> None:
    for index in indices:
        for number, known in enumerate(index.manifest["shards"]):
            path = Path(index.url(number))
            if not path.exists() or path.stat().st_size != known["bytes"]:
                again = f"remove {shlex.quote(str(out))} first"
                raise DataError(f"{out} was built from this input, but {path} is missing or cut; {again}")


def _prepare(work: Path, signature: str) -> None:
    """A work folder for this job: the one of an interrupted build of the same job, or a new one."""
    mark = work / "job.json"
    if work.exists() and (not mark.exists() or mark.read_text() != signature):
        log.warning("%s is left from another build: starting over", work)
        shutil.rmtree(work)
    (work / "chunks").mkdir(parents=True, exist_ok=True)
    write_whole(mark, signature.encode())


def check_first_rows(sources: Sequence[str], options: BuildOptions, *, rows: int = 1000) -> None:
    """DataError for what is wrong with the first rows of files, as :func:`build` would say; nothing is written."""
    dropped = Dropped()
    for job in _convert_jobs(sources, Path(), options, dropped, first=rows):
        for _ in convert_rows(job, dropped):
            pass
        _refuse_malformed(dropped, options)


def _refuse_malformed(dropped: Dropped, options: BuildOptions) -> None:
    if dropped.malformed and options.on_error == "raise":
        raise DataError(f"{dropped.malformed}; mend it, or {SKIP} to drop and count such rows")


# ---------------------------------------------------------------------------------------------------- first pass


def _convert(
    sources: Sequence[str], work: Path, options: BuildOptions, workers: int, progress: bool
) -> tuple[Dropped, int]:
    dropped, rows = Dropped(), 0
    jobs = _convert_jobs(sources, work / "chunks", options, dropped)
    with bar_of(None, "converting", unit="row", shown=progress, delay=OFTEN_QUICK) as bar:
        for result in ordered_map(convert_chunk, jobs, workers=workers):
            dropped.merge(result.dropped)
            _refuse_malformed(dropped, options)
            rows += result.rows
            bar.update(result.rows)
    return dropped, rows


def _convert_jobs(
    sources: Sequence[str], folder: Path, options: BuildOptions, dropped: Dropped, first: int | None = None
) -> Iterator[ConvertJob]:
    number = 0
    whole = [row_source(name, options.source) for name in sources]
    for source in (part for one in whole for part in parts_of_folder(one)):
        name = Path(urlparse(source.name).path if is_remote(source.name) else source.name).name.split(".")[0]
        rows = _until_torn(_rows(source, options, first), options.on_error, dropped)
        for chunk in chunks(rows, ROWS_PER_CHUNK):
            yield ConvertJob(number, chunk, name, folder, options.convert)
            number += 1


def _until_torn(rows: Iterator[Row], on_error: str, dropped: Dropped) -> Iterator[Row]:
    """The rows up to where a compressed file is cut; the cut is an error or, with ``skip``, counted."""
    try:
        yield from rows
    except RecordError as error:
        if on_error == "raise":
            raise DataError(f"{error}; get it again, or {SKIP} to use what is good") from error
        dropped.add(error, "source")


def _rows(source: RowSource, options: BuildOptions, first: int | None) -> Iterator[Row]:
    """The rows of a source, of its ``first`` rows if given; answers given one a row with their correctness are gathered
    by question."""
    rows: Iterator[Row] = islice(_readable(read_rows(source), hidden(source.name)), first)
    number = 0
    if options.convert.format in ("auto", "candidates"):
        rows = _gathered(rows, hidden(source.name), options.convert.columns)
    for number, row in enumerate(rows, 1):
        if options.limit and number > options.limit:
            return
        yield row
    if not number:
        raise DataError(f"{source.name} has no rows")


def _readable(rows: Iterator[Row], source: str) -> Iterator[Row]:
    try:
        yield from rows
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}") from error


def _gathered(rows: Iterable[Row], source: str, columns: Columns) -> Iterator[Row]:
    """The rows as they are, and behind them one per question that was answered in rows of the long layout."""
    groups: dict[str, dict] = {}
    for row in rows:
        if not _gather(row, groups, columns):
            yield row
    for number, group in enumerate(groups.values(), 1):
        yield Row(f"{source}, question {number}", group)


def _gather(row: Row, groups: dict[str, dict], columns: Columns) -> bool:
    """Whether the row is of the long layout and stands in its group now."""
    if isinstance(row.data, bytes) and b'correct"' not in row.data and not columns:
        return False  # most rows: they are parsed where they are converted
    try:
        if is_long(fields := Fields(row.parsed(), columns)):
            add_long_row(groups, fields)
            return True
    except RecordError:
        pass  # the converter reports it with its place
    return False


# --------------------------------------------------------------------------------------------------- second pass


@dataclass(frozen=True)
class ShardJob:
    """One shard: where it goes, the stored records it takes (HASHES, in order) and which of their ids get a suffix."""

    path: Path
    folder: Path
    first: int  # number of its first record: keys are running numbers over the whole split
    records: np.ndarray
    renamed: np.ndarray


def _write(
    work: Path, options: BuildOptions, dropped: Dropped, rows: int, job: dict, workers: int, progress: bool
) -> dict:
    """Deal the converted records to splits and shards, write them, and index what was written."""
    hashes = np.concatenate(
        [np.load(path) for path in sorted((work / "chunks").glob("*.npy"))] or [np.zeros(0, HASHES)]
    )
    kept = hashes[np.sort(np.unique(hashes["content"], return_index=True)[1])]
    if len(kept) < len(hashes):
        dropped.counts["duplicate"] += len(hashes) - len(kept)
    if not len(kept):
        raise DataError(f"no usable record in {rows} rows of {', '.join(job['sources'])}: {describe_drops(dropped)}")
    result = work / "result"
    result.mkdir(exist_ok=True)
    report = {"rows": rows, "records": len(kept), "dropped": dropped.as_json(), "told": dict(dropped.told)}
    manifests = []
    for folder, records in _splits(result, kept, options):
        manifest, entries, keys = _write_split(folder, work / "chunks", records, options.shard_size, workers, progress)
        manifest |= {"provenance": {"job": job, "report": report}}
        manifests.append(save_index(folder, manifest, entries, keys))
    return manifests[0]


def describe_drops(dropped: Dropped) -> str:
    """One line of all that was dropped, with the first example."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(dropped.counts.items()))
    first = next((places[0] for places in dropped.examples.values() if places), "")
    return kinds + (f" (first: {first})" if first else "")


def _splits(result: Path, kept: np.ndarray, options: BuildOptions) -> list[tuple[Path, np.ndarray]]:
    if not options.eval_fraction:
        return [(result, _shuffled(kept, options.shuffle_seed))]
    held_out = eval_mask(kept["prompt"], options.eval_fraction)
    sides = (("train", kept[~held_out]), ("eval", kept[held_out]))
    return [(result / name, _shuffled(records, options.shuffle_seed)) for name, records in sides]


def _shuffled(records: np.ndarray, seed: int | None) -> np.ndarray:
    if seed is None:
        return records
    return records[np.random.Generator(np.random.Philox(np.random.SeedSequence([seed]))).permutation(len(records))]


def _write_split(
    folder: Path, chunk_folder: Path, records: np.ndarray, size: int, workers: int, progress: bool
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Write the shards of one folder; (manifest, entries, key bytes) of what is read back from them."""
    folder.mkdir(exist_ok=True)
    renamed = _repeated_ids(records)
    jobs = [
        ShardJob(path, chunk_folder, first, records[first : first + size], renamed[first : first + size])
        for first in range(0, len(records), size)
        for path in (folder / f"shard-{first // size:05d}.tar",)
    ]
    with bar_of(len(records), f"writing {folder.name}", unit="record", shown=progress, delay=OFTEN_QUICK) as bar:
        scans = []
        for scan in ordered_map(write_and_scan, jobs, workers=workers):
            scans.append(scan)
            bar.update(len(scan.entries))
    manifest, entries, keys = merge_scans([job.path.name for job in jobs], scans)
    if manifest["bad"] or len(entries) != len(records):
        raise RuntimeError(f"{folder}: wrote {len(records)} records, read back {len(entries)}: {manifest['bad'][:3]}")
    return manifest, entries, keys


def _repeated_ids(records: np.ndarray) -> np.ndarray:
    """True where an id was met before with another content: it gets a suffix, as ids are unique in a corpus."""
    repeated = np.ones(len(records), bool)
    repeated[np.unique(records["id"], return_index=True)[1]] = False
    return repeated


def write_and_scan(job: ShardJob) -> ShardScan:
    """Write one shard, unless it is there from an interrupted build, and read it back for the index."""
    if not job.path.exists():
        write_shard(job.path, _members(job))
    return scan_shard(job.path)


def _members(job: ShardJob) -> Iterator[tuple[str, bytes]]:
    files: dict[int, int] = {}
    try:
        for place, (record, renamed) in enumerate(zip(job.records, job.renamed, strict=True), job.first):
            chunk = int(record["chunk"])
            if chunk not in files:
                files[chunk] = os.open(job.folder / f"chunk-{chunk:06d}.bin", os.O_RDONLY)
            data = os.pread(files[chunk], int(record["size"]), int(record["offset"]))
            yield f"{place:09d}", _with_suffix(data, f"#{int(record['content']):016x}" if renamed else "")
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _with_suffix(data: bytes, suffix: str) -> bytes:
    if not suffix:
        return data
    fields = json.loads(data)
    fields["id"] += suffix
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
