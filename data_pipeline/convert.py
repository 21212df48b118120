"""First pass of a build: a chunk of rows → checked records in a chunk file, their hashes, what was dropped and why.

A chunk is three files, ``.bin`` (stored records, end to end), ``.npy`` (``HASHES``, one a record), ``.json`` (counts);
the last is written last and marks the chunk as complete.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.records import (
    Record,
    RecordError,
    answers_of,
    content_hash,
    encode_record,
    prompt_hash,
    stable_hash,
    text_bytes,
)
from data_pipeline.sources.candidates import Pairing
from data_pipeline.sources.columns import Columns
from data_pipeline.sources.files import Row
from data_pipeline.sources.formats import convert

CONVERSION = 7  # raised when equal rows become other records: what was built before is then built anew
EXAMPLES_KEPT = 5
HASHES = np.dtype(
    [("offset", "<i8"), ("size", "<u4"), ("chunk", "<u4"), ("id", "<u8"), ("content", "<u8"), ("prompt", "<u8")]
)


@dataclass(frozen=True)
class ConvertOptions:
    """How rows become records. ``max_bytes``: a prompt and its longest answer together (0: no limit)."""

    format: str = "auto"
    pairing: Pairing = field(default_factory=Pairing)
    max_bytes: int = 0
    columns: Columns = ()


@dataclass
class Dropped:
    """What was dropped, by kind, with the first few places. ``malformed`` is the first row of a broken kind. ``told``
    counts what was not dropped and the user should know: columns that nobody read, prompts that were guessed."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    malformed: str = ""
    told: Counter = field(default_factory=Counter)

    def add(self, error: RecordError, where: str) -> None:
        """Count one drop."""
        self.counts[error.kind] += 1
        places = self.examples.setdefault(error.kind, [])
        if len(places) < EXAMPLES_KEPT:
            places.append(f"{where}: {error}")
        if error.malformed and not self.malformed:
            self.malformed = f"{where}: {error}"

    def merge(self, other: "Dropped") -> None:
        """Add the drops of a later chunk."""
        self.counts.update(other.counts)
        for kind, places in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + places)[:EXAMPLES_KEPT]
        self.malformed = self.malformed or other.malformed
        self.told.update(other.told)

    def as_json(self) -> dict:
        """For manifests: kind → count and examples."""
        return {k: {"count": n, "examples": self.examples.get(k, [])} for k, n in sorted(self.counts.items())}


def told_in_a_line(told: Mapping[str, int]) -> str:
    """What rows that were kept held besides: columns that nobody read, prompts that were guessed; '' for nothing."""
    unread = {name.removeprefix("column "): n for name, n in told.items() if name.startswith("column ")}
    columns = ", ".join(f"{name} ({n})" for name, n in sorted(unread.items()))
    rest = [f"{name} ({n})" for name, n in told.items() if not name.startswith("column ")]
    return "; ".join([f"columns not read: {columns}"] * bool(columns) + rest)


@dataclass(frozen=True)
class ConvertJob:
    """One chunk: its number, its rows, where its files go."""

    number: int
    rows: list[Row]
    source: str  # becomes meta.source of records that have none
    folder: Path
    options: ConvertOptions

    @property
    def stem(self) -> Path:
        """Path of the chunk's files, without extension."""
        return self.folder / f"chunk-{self.number:06d}"


@dataclass(frozen=True)
class ConvertResult:
    """What the parent needs of a chunk."""

    number: int
    rows: int
    dropped: Dropped


def convert_chunk(job: ConvertJob) -> ConvertResult:
    """Convert the rows of a job and write its chunk, unless a complete chunk is there from an interrupted build."""
    if job.stem.with_suffix(".json").exists():
        return read_result(job.stem, job.number)
    dropped, hashes, offset = Dropped(), [], 0
    with job.stem.with_suffix(".bin").open("wb") as file:
        for record in convert_rows(job, dropped):
            data = encode_record(record)
            ids = (stable_hash(record.id), content_hash(record), prompt_hash(record))
            hashes.append((offset, len(data), job.number, *ids))
            offset += file.write(data)
    np.save(job.stem.with_suffix(".npy"), np.array(hashes, dtype=HASHES))
    result = ConvertResult(job.number, len(job.rows), dropped)
    _write_result(job.stem, result)
    return result


def convert_rows(job: ConvertJob, dropped: Dropped) -> Iterator[Record]:
    """The records of a job's rows; what is no record is added to ``dropped``."""
    for row in job.rows:
        yield from _records_of(row, job, dropped)


def _records_of(row: Row, job: ConvertJob, dropped: Dropped) -> list[Record]:
    try:
        options = {name: getattr(job.options, name) for name in ("format", "pairing", "columns")}
        records = list(convert(row.parsed(), **options, told=dropped.told))
    except RecordError as error:
        dropped.add(error, row.where)
        return []
    for record in records:
        record.meta.setdefault("source", job.source)
    if not job.options.max_bytes:
        return records
    return [record for record in records if _fits(record, row, job.options.max_bytes, dropped)]


def _fits(record: Record, row: Row, max_bytes: int, dropped: Dropped) -> bool:
    length = text_bytes(record.prompt) + max(text_bytes(answer) for answer in answers_of(record))
    if length > max_bytes:
        dropped.add(RecordError("over_long", f"{length} bytes of text, {max_bytes} allowed"), row.where)
    return length <= max_bytes


def _write_result(stem: Path, result: ConvertResult) -> None:
    dropped = result.dropped
    data = {
        "rows": result.rows,
        "counts": dropped.counts,
        "examples": dropped.examples,
        "malformed": dropped.malformed,
        "told": dropped.told,
    }
    write_whole(stem.with_suffix(".json"), json.dumps(data).encode("utf-8", "surrogatepass"))


def read_result(stem: Path, number: int) -> ConvertResult:
    """The result of a complete chunk."""
    data = json.loads(stem.with_suffix(".json").read_text())
    dropped = Dropped(Counter(data["counts"]), data["examples"], data["malformed"], Counter(data["told"]))
    return ConvertResult(number, data["rows"], dropped)
