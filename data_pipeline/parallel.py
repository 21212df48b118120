"""Ordered parallel map with a bounded queue: results come in the order of the jobs, whatever finishes first."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int) -> Iterator[Result]:
    """``map`` over processes (0: in this one). At most two jobs a worker are taken ahead of the results consumed.

    Raises ChildProcessError (an OSError) when a process is killed from outside, for want of memory for instance.
    """
    if workers == 0:
        yield from map(function, jobs)
        return
    # spawn: the caller may hold threads or a GPU, neither of which survives a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                with _without_interrupts():
                    waiting.append(pool.submit(function, job))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, perhaps for want of memory (--workers: fewer)"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in here never see Ctrl-C: this one alone decides what it means. It arrives afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a process of the pool: end when the one that started it is gone, also by ``kill -9``."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def chunks(items: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
