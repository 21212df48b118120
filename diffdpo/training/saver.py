"""Checkpoints beside the steps: where the engine can hand over a copy of its state, a thread writes it meanwhile."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdpo.engine.base import Engine
from diffdpo.engine.world import World
from diffdpo.training.checkpoint import NotSaved, Place, planned_bytes, save_checkpoint, write_checkpoint

Outcome = Path | NotSaved


@dataclass
class Saver:
    """Saves one checkpoint at a time. Every rank calls its methods alike, and each has a thread that writes its part.

    ``on_saved``: called on every rank when a checkpoint is whole; ``on_not_saved``: where there was no room for one;
    ``on_waiting``: when the step is to wait for all of a save.
    """

    output_dir: Path
    engine: Engine
    keep: int
    on_saved: Callable[[int, Path], None]
    on_not_saved: Callable[[int, NotSaved], None]
    on_waiting: Callable[[], None] = lambda: None
    step: int | None = None  # of the checkpoint that is being written
    thread: threading.Thread | None = None
    outcome: Outcome | None = None  # what the thread came to
    beside: World | None = None  # what the threads talk in

    def save(self, step: int, state: dict[str, Any], *, wait: bool) -> None:
        """Write the engine's state as it is now; ``wait``: until it is whole."""
        self.settle()
        world = self.engine.world
        self.beside = self.beside or world.beside()
        write = None if wait else self.engine.snapshot(self.beside)
        if world.all_reduce_max(int(write is None)):  # one without memory decides for all
            self._save_now(step, state)
            return
        assert write is not None, "nobody has said so"
        self.step = step
        place = Place(self.output_dir, step, self.beside, planned_bytes(self.engine))
        self.thread = threading.Thread(target=self._write, args=(place, write, state), name="saver")
        self.thread.start()

    def _save_now(self, step: int, state: dict[str, Any]) -> None:
        self.on_waiting()
        try:
            self._tell(step, save_checkpoint(self.output_dir, step, self.engine, state, keep=self.keep))
        except NotSaved as error:
            self._tell(step, error)

    def _write(self, place: Place, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        try:
            self.outcome = write_checkpoint(place, write, state, keep=self.keep)
        except NotSaved as error:
            self.outcome = error
        except Exception as error:  # a thread's would be heard by nobody
            self.outcome = NotSaved(f"{place.partial} was not written: {error!r}", full=False)

    def is_done(self) -> bool:
        """Whether the thread has come to an end that has not been told yet."""
        return self.thread is not None and not self.thread.is_alive()

    def settle(self) -> None:
        """Wait for what is being written, and tell what came of it."""
        if self.step is None:
            return
        self.join()
        step, outcome = self.step, self.engine.world.broadcast(_portable(self.outcome))
        self.step, self.thread, self.outcome = None, None, None
        self._tell(step, NotSaved(outcome[0], full=outcome[1]) if isinstance(outcome, tuple) else outcome)

    def join(self) -> None:
        """Wait for the thread alone, without the other ranks: for who leaves with an error."""
        if self.thread is not None:
            self.thread.join()

    def _tell(self, step: int, outcome: Outcome) -> None:
        if isinstance(outcome, NotSaved):
            self.on_not_saved(step, outcome)
        else:
            self.on_saved(step, outcome)


def _portable(outcome: Outcome | None) -> Path | tuple[str, bool] | None:
    """An error does not survive being pickled with its keywords."""
    return (str(outcome), outcome.full) if isinstance(outcome, NotSaved) else outcome
