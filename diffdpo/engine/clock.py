"""Where a process spends a step: seconds by phase, and among them those in which it waits for other processes.

On a GPU the marks are events in its stream, read when the step is over, so that nothing waits for them. Waiting is
taken from ``Work.wait``, through which torch.distributed blocks, whoever called: our own sums, DeepSpeed, FSDP2. On the
CPU that is all of a collective; on a GPU the time its stream stood still for one. What a library hides behind a stream
of its own stays in the phase that it delays.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

COMMUNICATION = "communication"
PHASES = ("data", "noise", "reference", "forward", "backward", COMMUNICATION, "optimizer")

Mark = Any  # a time in seconds, or an event of a GPU's stream


class Clock:
    """Times one process. Phases do not nest: what begins inside another belongs to that (the forward of a recomputation
    to the backward), but for communication, which is taken out of the phase it is in. ``event``: marks now in a GPU's
    stream; without one marks are the host's seconds."""

    def __init__(self, event: Callable[[], Mark] | None = None):
        self.event = event
        self.inside: str | None = None
        self.waits = False  # inside a wait: a library's wait may call torch's
        self.spans: list[tuple[str, str | None, Mark, Mark]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is counted as ``name``, unless it is part of a phase already."""
        if self.inside is not None:
            yield
            return
        self.inside, start = name, self._mark()
        try:
            yield
        finally:
            self.spans.append((name, None, start, self._mark()))
            self.inside = None

    @contextmanager
    def wait(self) -> Iterator[None]:
        """What runs inside is counted as communication."""
        if self.waits:
            yield
            return
        self.waits, start = True, self._mark()
        try:
            yield
        finally:
            self.spans.append((COMMUNICATION, self.inside, start, self._mark()))
            self.waits = False

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and from 0 again. On a GPU: when the last of them has run."""
        spans, self.spans = self.spans, []
        seconds = dict.fromkeys(PHASES, 0.0)
        if self.event and spans:
            spans[-1][3].synchronize()
        for name, outer, start, end in spans:
            spent = start.elapsed_time(end) / 1000 if self.event else end - start
            seconds[name] += spent
            if outer is not None:
                seconds[outer] -= spent
        return seconds

    def _mark(self) -> Mark:
        return self.event() if self.event else time.perf_counter()


def timed(name: str) -> Callable[[Callable], Callable]:
    """A method of something with a ``world``, counted as a phase."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.world.clock.phase(name):
                return method(self, *args, **kwargs)

        return run

    return decorate


def count_waits(clock: Clock | None) -> None:
    """From now on ``Work.wait`` is counted by this clock (None: by none)."""
    original = getattr(dist.Work.wait, "original", dist.Work.wait)
    if clock is None:
        dist.Work.wait = original  # type: ignore[method-assign]
        return

    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        with clock.wait():
            return original(work, *args, **kwargs)

    wait.original = original  # type: ignore[attr-defined]
    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
