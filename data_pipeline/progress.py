"""How far something slow is: a bar on a terminal, in a log file a line every so often and no endless one."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS = 30.0  # between two lines of a log
OFTEN_QUICK = 5.0  # seconds before work shows a bar that mostly is done by then; in a log file SECONDS
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines(tqdm):
    """A bar for a file: whole lines, at the start, every ``SECONDS`` and at the end."""

    disable: bool
    shown: tuple[float, float] | None = None  # when, and how far it was

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """A line, where one is due."""
        if self.shown is None or time.monotonic() - self.shown[0] >= SECONDS:
            self._show()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing that was written to a file can be taken back."""

    def close(self) -> None:
        """The last line, where the one before says less."""
        if self.disable:
            return
        late = self.shown is None and self.delay > 0  # done before there was anything to show
        if not late and (self.shown is None or self.shown[1] != self.n):
            self._show()
        self.disable = True
        self._decr_instances(self)

    def _show(self) -> None:
        self.shown = time.monotonic(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def bar_of(
    total: int | None, what: str, *, unit: str, shown: bool = True, initial: int = 0, delay: float = 0.0
) -> tqdm:
    """A bar of ``total`` ``unit``s on stderr, or lines where that is no terminal.

    ``shown``: on rank 0. ``delay``: nothing is shown before so many seconds.
    """
    options: dict[str, Any] = {"total": total, "desc": what, "unit": unit, "disable": not shown, "initial": initial}
    options["delay"] = delay
    if sys.stderr.isatty():
        return tqdm(**options, dynamic_ncols=True)
    options["delay"] = SECONDS if delay else 0.0  # a log file is to hold what was slow, and a mistake's one line
    return Lines(**options, bar_format=LINE)


def with_bar(items: Iterable[Item], total: int, what: str, *, unit: str, shown: bool = True) -> Iterator[Item]:
    """The items, with a bar where they take more than ``OFTEN_QUICK`` seconds."""
    with bar_of(total, what, unit=unit, shown=shown, delay=OFTEN_QUICK) as bar:
        for item in items:
            yield item
            bar.update()
