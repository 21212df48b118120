"""``metrics.jsonl``: one line a step, appended as the step ends. The durable record; everything else is fed from it."""

import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from diffdpo.errors import UserError

FILE = "metrics.jsonl"
NOTE = "note"  # the key of a line's words for the reader; every other value is a number
GAP = ", without steps "  # in a note, before what is missing and no earlier note tells
CHANGED = "had been changed before"
MOST_PENDING = 64 << 20  # bytes of lines kept in memory while the disk is full
TAIL = 16 << 10  # bytes of its end that a checkpoint keeps: what a torn journal is mended with


@dataclass(frozen=True)
class Position:
    """How far a journal was written, and its last bytes: what a checkpoint says of it."""

    lines: int
    bytes: int
    sha256: str
    tail: str = ""  # latin-1: bytes as they are


class Journal:
    """The open ``metrics.jsonl`` of a run."""

    def __init__(
        self,
        output_dir: Path,
        *,
        resume_step: int | None = None,
        position: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
        every: int | None = None,
        wait_for_room: bool = False,
        told: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """``resume_step``: keep lines up to this step and drop the rest, which will be run again. ``position``: where
        the journal was at that step; an end that is lost is taken from it, and what is missing or changed before it
        is told, in the journal too, counted in ``every`` steps. ``wait_for_room``: keep lines in memory while the
        disk is full, instead of raising OSError; ``told``: writes are made in it, to raise in its own words.
        UserError where a folder stands in its place."""
        self.path, self.wait_for_room, self.told, self.pending = output_dir / FILE, wait_for_room, told, b""
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder, where the run writes a file of that name; move it away")
        before = self.path.read_bytes() if resume_step is not None and self.path.exists() else b""
        fault = ""
        if resume_step is not None:
            known = Position(**position) if position else None
            before, fault = kept_lines(before, resume_step, known, every)
        write_whole(self.path, before)
        self.file = self.path.open("ab", buffering=0)
        self.lines, self.bytes, self.sum = before.count(b"\n"), len(before), hashlib.sha256(before)
        self.tail = before[-TAIL:]
        if fault and resume_step is not None:
            say(f"{self.path}: {fault}")
            self.note(resume_step, fault)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. Numbers that are not finite are written as null, which every JSON reader takes."""
        self._append(step, {key: float(v) if math.isfinite(v) else None for key, v in metrics.items()})

    def note(self, step: int, text: str) -> None:
        """Append words for the reader."""
        self._append(step, {NOTE: text})

    def position(self) -> dict[str, Any]:
        """Where the journal is now."""
        return asdict(Position(self.lines, self.bytes, self.sum.hexdigest(), self.tail.decode("latin-1")))

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        line = (json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n").encode()
        self.lines, self.bytes = self.lines + 1, self.bytes + len(line)
        self.sum.update(line)
        self.tail = (self.tail + line)[-TAIL:]
        self.pending += line
        with self.told():
            self._write_pending()

    def _write_pending(self) -> None:
        try:
            while self.pending:  # a disk that fills up takes a part
                self.pending = self.pending[self.file.write(self.pending) :]
        except OSError:
            if not self.wait_for_room or len(self.pending) > MOST_PENDING:
                raise

    def sync(self) -> None:
        """Have the lines survive a power cut."""
        with self.told():
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Raises OSError as it is: whoever ends a run has its own words."""
        try:
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def kept_lines(raw: bytes, step: int, known: Position | None, every: int | None = None) -> tuple[bytes, str]:
    """The lines up to a step, and what is wrong with them; '' when they are as they were written."""
    tail = known.tail.encode("latin-1") if known else b""
    if known is not None:
        whole = raw[: max(known.bytes - len(tail), 0)] + tail
        if hashlib.sha256(whole).hexdigest() == known.sha256:
            restored = f"{CHANGED} step {step}: its end is taken from the checkpoint"
            return whole, "" if raw.startswith(whole) else restored
    found, last = parsed_lines(raw), parsed_lines(tail)
    ends = {(line["step"], line["time"], *line) for line in last}  # of a line that was edited only one form is kept
    lines = [line for line in found if (line["step"], line["time"], *line) not in ends] + last
    lines = [line for line in lines if line["step"] <= step]
    kept = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if known is None:
        return kept, ""
    steps = sorted({line["step"] for line in lines if line["step"] and not line.keys() <= {"step", "time", NOTE}})
    every = every or min((after - before for before, after in itertools.pairwise(steps)), default=1)  # --logging_steps
    known_gaps = told_gaps(lines)
    missing = [number for number in range(every, step + 1, every) if number not in steps and number not in known_gaps]
    gap = f"{GAP}{_ranges(missing)}" if missing else ""
    return kept, f"{CHANGED} step {step}: {len(lines)} of {known.lines} lines are left{gap}"


def told_gaps(lines: Iterable[Mapping[str, Any]]) -> set[int]:
    """Steps whose lines are gone, as notes among these lines tell."""
    texts = [line[NOTE].partition(GAP)[2] for line in lines if NOTE in line]
    ends = [ends for text in texts for ends in re.findall(r"(\d+)(?:-(\d+))?", text)]
    return {number for first, last in ends for number in range(int(first), int(last or first) + 1)}


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'; all of them: a gap that is not named is a silent one."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def parsed_lines(raw: bytes) -> list[dict[str, Any]]:
    """The lines that are whole."""
    return [line for line in map(parsed, raw.splitlines(keepends=True)) if line is not None]


def parsed(raw: bytes) -> dict[str, Any] | None:
    """A line of the journal; None for one that is torn or damaged."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
        return line if isinstance(line["step"], int) and isinstance(line["time"], float | int) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_journal(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The lines from byte ``start`` on; those that are torn or damaged are passed over."""
    with path.open("rb") as file:
        file.seek(start)
        for raw in file:
            if (line := parsed(raw)) is not None:
                yield line
