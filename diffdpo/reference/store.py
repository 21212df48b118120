"""Row scores of the reference on disk, found by (epoch, record).

A folder holds ``identity.json`` (what the scores depend on, see ``identity.py``) and ``epoch-E/*.part``. A part is
written whole or not at all, in this layout, little-endian:

    sha256 of the rest (32 bytes) | one line of JSON | records_P int64 | counts_P int32 | f_R float32

Records ascend; a record's rows (chosen side first) follow those of the record before it. A count of 0 stands for a
record that could not be read or encoded. Parts are checked when an epoch is opened; their scores stay on disk and are
mapped, so a million pairs cost 23 MB of memory, for their index.

Shape suffixes: P records of a part, E records of an epoch, B slots of a micro-batch, R rows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_whole
from diffdpo.errors import UserError

IDENTITY, SUFFIX = "identity.json", ".part"
SCHEMA = 1
DIGEST = 32
MAPPED_PARTS = 64  # mapped at a time; consecutive batches mostly stand in one


@dataclass(frozen=True)
class Part:
    """Scores of some records of one epoch. ``made_with``: the shapes they were computed in, on which bits depend."""

    records_P: np.ndarray
    counts_P: np.ndarray
    f_R: np.ndarray
    made_with: dict[str, Any]

    @staticmethod
    def of(pieces: Sequence["Part"]) -> "Part":
        """Several parts as one, by record; of a record that stands in two, the first counts."""
        records = np.concatenate([piece.records_P for piece in pieces])
        counts = np.concatenate([piece.counts_P for piece in pieces])
        f_R = np.concatenate([piece.f_R for piece in pieces])
        starts = np.cumsum(counts) - counts
        keep = np.unique(records, return_index=True)[1]
        rows = [f_R[start : start + count] for start, count in zip(starts[keep], counts[keep], strict=True)]
        scores = np.concatenate([np.zeros(0, np.float32), *rows])
        return Part(records[keep], counts[keep].astype(np.int32), scores, pieces[0].made_with)


def write_part(path: Path, part: Part) -> None:
    """Atomic: ``path`` is whole or absent, also after a power cut."""
    header = {"records": len(part.records_P), "rows": len(part.f_R), "made_with": part.made_with}
    arrays = (part.records_P.astype("<i8"), part.counts_P.astype("<i4"), part.f_R.astype("<f4"))
    body = b"".join([json.dumps(header, sort_keys=True).encode() + b"\n", *(array.tobytes() for array in arrays)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, hashlib.sha256(body).digest() + body)


def read_part(path: Path) -> Part:
    """The part, its scores mapped. ValueError says what is wrong with a damaged one."""
    with path.open("rb") as file:
        digest = file.read(DIGEST)
        line = file.readline()
        rest = file.read()
    if hashlib.sha256(line + rest).digest() != digest:
        raise ValueError(f"its sha256 is not the one it begins with ({DIGEST + len(line) + len(rest)} bytes)")
    header = json.loads(line)
    count, start = header["records"], DIGEST + len(line)
    records_P = np.frombuffer(rest, "<i8", count)
    counts_P = np.frombuffer(rest, "<i4", count, offset=8 * count)
    f_R: np.ndarray = np.zeros(0, np.float32)
    if header["rows"]:
        f_R = np.memmap(path, "<f4", mode="r", offset=start + 12 * count, shape=(header["rows"],))
    return Part(records_P.copy(), counts_P.copy(), f_R, header["made_with"])


@dataclass(frozen=True)
class _Epoch:
    """Where each record of an epoch stands; ``records_E`` ascends."""

    paths: tuple[Path, ...]
    records_E: np.ndarray
    part_E: np.ndarray
    start_E: np.ndarray
    count_E: np.ndarray
    damaged: dict[Path, str]
    made_with: tuple[dict[str, Any], ...]


class ScoreStore:
    """The scores in ``folder``; use ``open_store``. ``shapes``: parts made with others are left aside (None: none)."""

    def __init__(self, folder: Path, shapes: dict[str, Any] | None = None):
        self.folder, self.shapes = folder, shapes
        self._epochs: dict[int, _Epoch] = {}  # the one in use
        self._mapped = lru_cache(MAPPED_PARTS)(lambda path: read_part(path).f_R)

    def known(self, epoch: int, num_records: int) -> np.ndarray:
        """bool [num_records]: which records of the epoch are here."""
        found = np.zeros(num_records, bool)
        found[self._epoch(epoch).records_E] = True
        return found

    def damaged(self, epoch: int) -> tuple[str, ...]:
        """A line for each part that could not be read, and so is not counted among the known ones."""
        return tuple(f"{path} is damaged: {why}" for path, why in self._epoch(epoch).damaged.items())

    def remove_damaged(self, epoch: int) -> None:
        """Delete the parts that ``damaged`` names, once all processes of the host have looked at the epoch."""
        for path in self._epoch(epoch).damaged:
            path.unlink(missing_ok=True)

    def made_with(self, epoch: int) -> tuple[dict[str, Any], ...]:
        """The different shapes in which the epoch's scores were computed."""
        return self._epoch(epoch).made_with

    def add(self, epoch: int, name: str, part: Part) -> None:
        """Write a part; one of the same name is replaced."""
        path = self.folder / f"epoch-{epoch}" / (name + SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_part(path, part)
        self.forget()

    def forget(self) -> None:
        """Look at the folder anew."""
        self._epochs.clear()
        self._mapped.cache_clear()

    def lookup(self, epoch: int, records: Sequence[int], counts_B: np.ndarray, present_B: np.ndarray) -> np.ndarray:
        """f_R float32 of a micro-batch: ``counts_B`` rows a slot, zeros where nothing is ``present_B``.

        UserError for a record that has no scores here, or another number of rows.
        """
        epoch_index = self._epoch(epoch)
        starts_B = np.cumsum(counts_B) - counts_B
        f_R = np.zeros(int(counts_B.sum()), np.float32)
        place_B = np.searchsorted(epoch_index.records_E, np.asarray(records, np.int64))
        for b in np.flatnonzero(present_B).tolist():
            place = int(place_B[b])
            if place == len(epoch_index.records_E) or epoch_index.records_E[place] != records[b]:
                raise UserError(self._lacks(epoch, records[b], "no score"))
            count = int(epoch_index.count_E[place])
            if count != counts_B[b]:
                raise UserError(self._lacks(epoch, records[b], f"{count} row scores instead of {counts_B[b]}"))
            scores_R = self._mapped(epoch_index.paths[epoch_index.part_E[place]])
            start = int(epoch_index.start_E[place])
            f_R[starts_B[b] : starts_B[b] + count] = scores_R[start : start + count]
        return f_R

    def _lacks(self, epoch: int, record: int, found: str) -> str:
        return (
            f"reference scores in {self.folder}: {found} for record {record} of epoch {epoch}; the data were not all "
            "readable when they were made, or have changed: delete the folder and start again"
        )

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = _open_epoch(self.folder / f"epoch-{epoch}", self.shapes)
        return self._epochs[epoch]


def _open_epoch(folder: Path, shapes: dict[str, Any] | None) -> _Epoch:
    paths, damaged, made_with = list[Path](), dict[Path, str](), list[dict]()
    columns: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(4)]
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            part = read_part(path)
        except FileNotFoundError:  # a damaged one that another host has removed meanwhile
            continue
        except OSError as error:
            raise UserError(f"--reference_cache: {path} cannot be read ({error}); mend that, or delete it") from None
        except (ValueError, KeyError) as error:
            damaged[path] = str(error)
            continue
        if shapes not in (None, part.made_with):
            continue
        starts_P = np.cumsum(part.counts_P, dtype=np.int64) - part.counts_P
        numbers_P = np.full(len(part.records_P), len(paths))
        for column, values in zip(columns, (part.records_P, numbers_P, starts_P, part.counts_P), strict=True):
            column.append(values)
        paths.append(path)
        if part.made_with not in made_with:
            made_with.append(part.made_with)
    records, number, start, count = (np.concatenate(column) for column in columns)
    keep = np.unique(records, return_index=True)[1]
    small = (number[keep].astype(np.int32), start[keep].astype(np.int32), count[keep].astype(np.int32))
    return _Epoch(tuple(paths), records[keep], *small, damaged, tuple(made_with))


# ---------------------------------------------------------------------------------------------- identity


def make_folder(folder: Path, identity: dict[str, Any], *, about: dict[str, Any]) -> None:
    """Make a store, if there is none: one process of each host calls. ``about`` is for people to read."""
    path = folder / IDENTITY
    if not path.exists():
        if any(folder.glob(f"epoch-*/*{SUFFIX}")):
            raise UserError(f"--reference_cache: {folder} holds scores but no {IDENTITY}; delete it or name another")
        text = json.dumps({"schema": SCHEMA, "identity": identity, "about": about}, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())


def open_store(folder: Path, identity: dict[str, Any], *, shapes: dict[str, Any] | None = None) -> ScoreStore:
    """The store in ``folder``. UserError when it holds the scores of another ``identity``, naming what differs."""
    path = folder / IDENTITY
    try:
        found = json.loads(path.read_bytes())
        schema, known = found["schema"], dict(found["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--reference_cache: {path} cannot be read ({error}); delete its folder or name another"
        ) from None
    differs = [name for name in {**identity, **known} if known.get(name) != identity.get(name)]
    if schema != SCHEMA:
        differs, known, identity = ["schema"], {"schema": schema}, {"schema": SCHEMA}
    if differs:
        name = differs[0]
        more = f" (and {len(differs) - 1} more)" if len(differs) > 1 else ""
        raise UserError(
            f"--reference_cache: {path.parent} was made with {name} {known.get(name)}, this run has "
            f"{identity.get(name)}{more}; name another folder, or leave the flag out to have one chosen"
        )
    return ScoreStore(folder, shapes)
