"""A task over the processes of a command, its lines kept in a file, so that a run that was killed goes on in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.progress import bar_of
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.score_file import ScoreFile
from diffdpo.evaluation.tasks.base import Line, Subject, Task


@dataclass(frozen=True)
class Held:
    """The lines that a file holds: id → digest of what they are of."""

    file: ScoreFile | None
    done: dict[str, str]


def run_task(
    task: Task,
    subject: Subject,
    world: World,
    *,
    path: Path | None,
    settings: dict[str, Any],
    batch_size: int,
    title: str,
    shown: bool | None = None,
) -> list[Line]:
    """The line of each item, in the order of the items, on every process.

    ``path``: where lines are kept, each written once when it is known; what stands there already, made with the same
    ``settings``, is not made again. Processes share the items; what each of them gets does not depend on how many they
    are. ``shown``: whether progress is; by default on rank 0. UserError where a line there is of another item with the
    same id.
    """
    held = _open(path, settings, world)
    todo = [number for number, key in enumerate(task.keys) if not _is_done(key.id, key.digest, held.done, path)]
    made: list[Line] = []
    try:
        with bar_of(len(todo), title, unit="item", shown=world.is_main if shown is None else shown) as bar:
            for start in range(0, len(todo), batch_size * world.size):
                part = todo[start : start + batch_size * world.size]
                own = part[world.rank :: world.size]
                found = dict(zip(own, task.lines(subject, own) if own else [], strict=True))
                for each in world.all_gather_object(found):
                    found.update(each)
                for number in part:
                    made.append(found[number])
                    if held.file:
                        held.file.write(found[number], task.keys[number].digest)
                if held.file:
                    held.file.flush()
                bar.update(len(part))
    finally:
        if held.file:
            held.file.close()
    lines = {line["id"]: line for line in (world.broadcast(held.file.lines() if held.file else made))}
    return [lines[key.id] for key in task.keys]


def _open(path: Path | None, settings: dict[str, Any], world: World) -> Held:
    file = ScoreFile(path, settings) if path is not None and world.is_main else None
    return Held(file, world.broadcast(file.done if file else {}))


def _is_done(key: str, digest: str, done: dict[str, str], path: Path | None) -> bool:
    if key in done and done[key] != digest:
        raise UserError(f"record {key!r} is not what {path} holds the results of; name another --output")
    return key in done
