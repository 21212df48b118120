"""Answers that a run sampled, in ``answers.jsonl``: a line an answer, to read what training does to them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "answers.jsonl"


class SampleFile:
    """The open file of a run; written on rank 0. Lines after ``resume_step`` are dropped: they are sampled again."""

    def __init__(self, output_dir: Path, resume_step: int | None):
        self.path = output_dir / FILE
        self.step: Callable[[], int] = lambda: resume_step or 0
        kept = [] if resume_step is None else [line for line in read_samples(output_dir) if line["step"] <= resume_step]
        self.path.unlink(missing_ok=True)
        if kept:
            self._append(kept)

    def add(self, when: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers of an evaluation: prompt, what is right, what was sampled, and whether that is right."""
        self._append([{"step": self.step(), "when": when, **sample} for sample in samples])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_samples(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's file; those that are torn are passed over."""
    found = []
    path = output_dir / FILE
    for raw in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(raw)
            found.append({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return found
