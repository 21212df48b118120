"""The file that ``launch/score.py --output`` writes: a line a record. A run that was broken off goes on in it.

Beside FILE stand FILE.settings.json, how its scores were made, and FILE.records, of what: a hash of each line's record,
written before the line, so that a line that is whole has one.
"""

import json
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from data_pipeline.records import Record, content_hash
from diffdpo.errors import UserError

DIGEST = 17  # bytes of a line of FILE.records: 16 hex digits and the line's end


def digest(record: Record) -> str:
    """16 hex digits of what is scored of a record."""
    return f"{content_hash(record):016x}"


class ScoreFile:
    """``done``: id → digest of the records that the file holds. UserError if it was made in another way or is no such
    file; an unfinished last line is cut off."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.records = path, path.with_name(path.name + ".records")
        self.settings = path.with_name(path.name + ".settings.json")
        if path.exists() and path.stat().st_size:
            self._check(settings)
            self.done = self._held()
        else:
            self.done = {}
            write_whole(self.settings, (json.dumps(settings, indent=1) + "\n").encode())
            self.records.write_bytes(b"")
        self._lines = path.open("ab")
        self._digests = self.records.open("ab", buffering=0)  # at once: the lines' buffer may overflow at any line

    def write(self, line: dict[str, Any], record_digest: str) -> None:
        """Append a record's line; it counts once :meth:`flush` has returned."""
        self._digests.write(f"{record_digest}\n".encode())
        self._lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))

    def flush(self) -> None:
        """Hand over what was written."""
        self._lines.flush()

    def lines(self) -> list[dict[str, Any]]:
        """All that the file holds, in its order."""
        with self.path.open("rb") as file:
            return [json.loads(line) for line in file]

    def close(self) -> None:
        self._digests.close()
        self._lines.close()

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            before = dict(json.loads(self.settings.read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"--output {self.path} exists but {self.settings.name} does not tell how it was made, so it may hold "
                "anything; name another file"
            ) from None
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            found = ", ".join(f"--{name} {before.get(name)}" for name in changed)
            raise UserError(f"--output {self.path} was written with {found}; use the same, or another file")

    def _held(self) -> dict[str, str]:
        data = self.path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
        ids = [self._id_of(line, number) for number, line in enumerate(lines, 1)]
        digests = self.records.read_text().split() if self.records.exists() else []
        if len(digests) < len(ids):
            raise UserError(
                f"--output {self.path} has {len(ids)} records and {self.records.name} tells what {len(digests)} of "
                "them were; name another file"
            )
        for path, size in ((self.path, sum(map(len, lines)) + len(lines)), (self.records, DIGEST * len(ids))):
            with path.open("r+b") as file:
                file.truncate(size)
        return dict(zip(ids, digests, strict=False))

    def _id_of(self, line: bytes, number: int) -> str:
        try:
            return json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--output {self.path}:{number} is no line of this command; mend or remove it, or name another file"
            ) from None
