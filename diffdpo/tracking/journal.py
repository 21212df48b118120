"""``metrics.jsonl``: one line a step, appended as the step ends. The durable record; everything else is fed from it."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Journal:
    """The open ``metrics.jsonl`` of a run."""

    def __init__(self, output_dir: Path, *, resume_step: int | None = None):
        """``resume_step``: keep lines up to this step and drop the rest, which will be run again."""
        self.path = output_dir / FILE
        if resume_step is not None and self.path.exists():
            kept = [line for line in read_journal(self.path) if line["step"] <= resume_step]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)
        elif self.path.exists():
            self.path.unlink()
        self.file = self.path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. Numbers that are not finite are written as null, which every JSON reader takes."""
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line.update({key: float(v) if math.isfinite(v) else None for key, v in metrics.items()})
        self.file.write((json.dumps(line) + "\n").encode())

    def sync(self) -> None:
        """Have the lines survive a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def read_journal(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The lines from byte ``start`` on. A torn last line (the crash of its writer) ends the reading."""
    with path.open("rb") as file:
        file.seek(start)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            yield json.loads(raw)
