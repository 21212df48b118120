"""``--max_restarts``: the command is started again, from the newest checkpoint, when it ends as it should not.

Under a launcher each rank has one of these above it: where a rank dies the others end by themselves within seconds, and
all begin anew together.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from diffdpo.command import AT_KEYBOARD
from diffdpo.config import RunConfig
from diffdpo.errors import RESUMABLE

FOR_GOOD = (0, 2, RESUMABLE, AT_KEYBOARD)  # exit codes of a run that is finished, mistaken, or was told to stop
ATTEMPT = "DIFFDPO_ATTEMPT"  # in the environment of what is started here: which start it is, and by whom,
PARENT = "DIFFDPO_PARENT"  # as engine/companions.py and launcher.py read


def with_restarts(config: RunConfig, work: Callable[[], int]) -> int:
    """``work()``, or this very command as a child that is started again at most ``--max_restarts`` times."""
    if not config.max_restarts or ATTEMPT in os.environ:
        return work()
    return Restarts(config.max_restarts).run()


class Restarts:
    """One command line, run until it ends well."""

    def __init__(self, most: int):
        self.most, self.stopped = most, False
        self.child: subprocess.Popen | None = None

    def run(self) -> int:
        """The exit code of the last run; 128 + the signal's number for one that was killed."""
        before = signal.signal(signal.SIGTERM, self._hand_on), signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for attempt in range(self.most + 1):
                code = self._once(attempt)
                if code in FOR_GOOD or self.stopped:
                    return RESUMABLE if self.stopped and code not in FOR_GOOD else code
                if attempt < self.most and os.environ.get("RANK", "0") == "0":
                    told = f"ended with exit code {code}; started again from the newest checkpoint"
                    print(f"{told} ({attempt + 1} of {self.most})", file=sys.stderr, flush=True)
            return code
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])

    def _once(self, attempt: int) -> int:
        again = ["--resume_from_checkpoint", "auto"] if attempt else []
        own = {ATTEMPT: str(attempt), PARENT: str(os.getpid())}
        # what a shell ignores its children ignore: Ctrl-C is the child's to hear
        self.child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:], *again],
            env={**os.environ, **own},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        code = self.child.wait()
        return code if code >= 0 else 128 - code

    def _hand_on(self, number: int, frame: object) -> None:
        self.stopped = True
        if self.child is not None:
            self.child.send_signal(number)
