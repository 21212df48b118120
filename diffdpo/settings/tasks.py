"""Tasks as flags name them: NAME, or NAME@FILE for items of a file of their own. No torch in here."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cli import nearest
from data_pipeline.verifiers import REGEX, VERIFIERS, WAYS, find_verifier, split_names
from diffdpo.errors import UserError

PAIRS, PERPLEXITY, MULTIPLE_CHOICE = "pairs", "perplexity", "multiple_choice"
SCORED = (PAIRS, PERPLEXITY, MULTIPLE_CHOICE)
GENERATED = ("arithmetic", MULTIPLE_CHOICE)
"""Tasks that can make items of their own."""


@dataclass(frozen=True)
class TaskName:
    """``kind``: one of ``SCORED`` or a verifier's name. ``source``: of its items; None: those of the command."""

    kind: str
    source: str | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether answers are sampled and judged."""
        return self.kind not in SCORED


def task_names(text: str, *, flag: str, scored: tuple[str, ...] = SCORED) -> list[TaskName]:
    """The tasks of a text with commas between them, each once. UserError for what is no task, and DataError for a
    verifier that cannot be had."""
    found = []
    for word in split_names(text):
        task = _task_name(word)
        if task.kind not in scored and task.kind not in VERIFIERS and ":" not in task.kind:
            known = [*scored, *VERIFIERS]
            near = nearest(task.kind, known)
            raise UserError(
                f"{flag} {word}: there is no such task{f'; is {near} meant?' if near else ''} (known: "
                f"{', '.join(known)}, {WAYS}; each with @FILE for items of its own)"
            )
        if task.is_sampled:
            find_verifier(task.kind)
        if task not in found:
            found.append(task)
    return found


def _task_name(word: str) -> TaskName:
    kind, at, source = word.rpartition("@")
    if not at or (word.startswith(REGEX) and not Path(source).exists()):  # a pattern may hold an @
        return TaskName(word)
    if not source:
        raise UserError(f"{word}: a file's name must stand after the @")
    return TaskName(kind, source)
