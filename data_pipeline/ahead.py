"""A thread that keeps the next items of an iterator ready, in their order, while the consumer works on the last one.

The tokenizer and the engine both leave Python's lock while they compute, so reading and encoding a step costs the
trainer next to no time, also without worker processes. What is taken ahead is not consumed: it is in no count or state.
"""

import threading
import weakref
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")
JOIN_SECONDS = 5.0  # it may be in the middle of a download


class Ahead(Iterator[Item], Generic[Item]):
    """``items``, of which up to ``depth`` are made ahead. What ``items`` raises is raised when its place is reached.

    ``items`` is used by one thread at a time only, and closed when it is a generator. The thread ends with the items,
    with ``close``, or when this object goes.
    """

    def __init__(self, items: Iterator[Item], depth: int):
        self._ready: Queue[tuple[bool, Item | BaseException]] = Queue(depth)  # (whether it is an item, which)
        stop = threading.Event()
        # the thread must not hold self, or the object would never go
        thread = threading.Thread(target=_fill, args=(items, self._ready, stop), name="data ahead", daemon=True)
        self._finalize = weakref.finalize(self, _stop, thread, self._ready, stop)  # also at the interpreter's exit
        thread.start()

    def __next__(self) -> Item:
        if not self._finalize.alive:
            raise StopIteration
        is_item, value = self._ready.get()
        if is_item:
            return value  # type: ignore[return-value]
        self.close()
        raise value  # type: ignore[misc]

    def close(self) -> None:
        """End the thread. Further ``next`` raise StopIteration."""
        self._finalize()


def _fill(items: Iterator, ready: Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            ready.put((True, item))
            if stop.is_set():
                return
        ready.put((False, StopIteration()))
    except BaseException as error:  # not lost: raised by the consumer's next()
        ready.put((False, error))
    finally:
        if close := getattr(items, "close", None):
            close()


def _stop(thread: threading.Thread, ready: Queue, stop: threading.Event) -> None:
    stop.set()
    try:
        while True:  # room for the one entry the thread may be about to put
            ready.get_nowait()
    except Empty:
        pass
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)
