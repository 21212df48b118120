"""Whether packages can be imported, found out in a child process: a crash or a hang in one is an answer like any other.

No torch in here, nor anything else that may be missing.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from threading import Lock

SECONDS = 60  # for one package, from a cold or far disk
MODULES = {"liger-kernel": "liger_kernel", "pyyaml": "yaml"}
"""Package → what Python calls it, where that is another name."""


class Imports:
    """Imports ``packages`` one by one, beside whatever the doctor looks at meanwhile."""

    def __init__(self, packages: Sequence[str], seconds: int = SECONDS):
        self._seconds = seconds
        self._faults: dict[str, str] = {}
        self._left = list(packages)
        self._lock = Lock()  # two looks may ask, where the first was given up
        self._child = self._begin() if self._left else None

    def fault(self, package: str) -> str:
        """Why it cannot be imported, in one line; '' where it can, or was not asked for. Waits until that is known."""
        with self._lock:
            while package in self._left:
                self._hear()
            return self._faults.get(package, "")

    def _begin(self) -> subprocess.Popen[str]:
        # -P and PYTHONPATH: the child looks where this process does, and not in the folder that it is started in
        command = [sys.executable, "-P", "-c", "from diffdpo.doctor.imports import child; child()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        modules = [module_of(package) for package in self._left]
        return subprocess.Popen(
            [*command, str(self._seconds), *modules],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _hear(self) -> None:
        """The child's next answer. Where it ended instead, the package it was at is to blame, and another goes on."""
        assert self._child is not None and self._child.stdout is not None
        line = self._child.stdout.readline()
        self._faults[self._left.pop(0)] = json.loads(line) if line else self._ended(self._child.wait())
        if not line and self._left:
            self._child = self._begin()
        elif not self._left:
            self._child.wait()

    def _ended(self, code: int) -> str:
        if code == -signal.SIGALRM:
            return f"no end within {self._seconds} s"
        return f"ends Python by {signal.Signals(-code).name}" if code < 0 else f"ends Python with exit code {code}"


def module_of(package: str) -> str:
    """The name that Python imports it by."""
    return MODULES.get(package, package.replace("-", "_"))


def child() -> None:
    """Import what the command line names; a line of JSON for each: '', or what was wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    seconds = int(sys.argv[1])
    for module in sys.argv[2:]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process also where it hangs outside Python
        signal.alarm(seconds)
        try:
            importlib.import_module(module)
            fault = ""
        except BaseException as failure:  # SystemExit is as good a reason as any
            said = str(failure).strip().splitlines() or [""]
            fault = f"{type(failure).__name__}: {said[-1].strip()}"[:200]
        signal.alarm(0)
        print(json.dumps(fault), file=answers, flush=True)
    os._exit(0)  # threads and exit handlers of packages have nothing to do here
