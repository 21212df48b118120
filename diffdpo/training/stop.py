"""How a run is told to stop, and how long it may take.

SIGTERM is a supervisor's word: what can be saved is saved, the rest is left, and the process has ended within
``--stop_seconds``, whatever it is waiting for. Ctrl-C is a person's: in training the step in progress is finished and
saved, however long that takes, and a second one ends at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffdpo.errors import RESUMABLE, Stopped


@dataclass
class StopRequest:
    """Whether a run has been asked to stop, and until when it must have ended."""

    seconds: float = 10.0
    say: Callable[[str], None] = print
    asked: threading.Event = field(default_factory=threading.Event)
    deferred: bool = False  # a signal is only noted: whoever has set this looks at ``asked``
    deadline: float | None = None  # time.monotonic()
    ended: threading.Event = field(default_factory=threading.Event)

    def remaining(self) -> float:
        """Seconds until the process must have ended; infinite where nobody has set a time."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    @contextmanager
    def set_deferred(self, deferred: bool) -> Iterator[None]:
        """Inside, a signal is only noted, or acts at once."""
        before, self.deferred = self.deferred, deferred
        try:
            if not deferred and self.asked.is_set():
                raise Stopped
            yield
        finally:
            self.deferred = before

    def on_signal(self, number: int, frame: object) -> None:
        """Python's handler, in the main thread between two of its instructions."""
        if number == signal.SIGINT and (self.asked.is_set() or not self.deferred):
            raise KeyboardInterrupt
        again = self.asked.is_set()
        self.asked.set()
        if not self.deferred and not again:
            raise Stopped

    def watch(self, wake: int) -> None:
        """In a thread of its own: Python's handler does not run while the main thread waits in C for another process
        or a disk, but the byte that C's handler writes arrives at once."""
        while number := os.read(wake, 1):
            if number[0] == signal.SIGTERM and self.deadline is None:
                self.deadline = time.monotonic() + self.seconds
                threading.Thread(target=self._end_in_time, name="deadline", daemon=True).start()

    def _end_in_time(self) -> None:
        if not self.ended.wait(max(0.0, self.seconds - 0.5)):
            self.say(f"told to stop and not done within {self.seconds:g} s (--stop_seconds): ended as it was")
            sys.stdout.flush()
            os._exit(RESUMABLE)


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Listen to SIGTERM and Ctrl-C inside. Only the main thread may; a notebook's other threads train without."""
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    out, wake = os.pipe()
    os.set_blocking(wake, False)
    before = {number: signal.signal(number, request.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    fd_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=request.watch, args=(out,), name="signals", daemon=True).start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)  # ends the thread
