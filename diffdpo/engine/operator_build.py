"""How DeepSpeed's operators are compiled: how long it takes, with how many compilers, and several at the same time.

ninja starts a compiler for every core and two more unless MAX_JOBS says otherwise, whatever memory there is; and
DeepSpeed compiles one operator after another, though each is two files or a few and leaves most cores idle.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from diffdpo.children import die_with_parent
from diffdpo.engine.operator_cache import operator_folder

SECONDS = {"cpu_adam": 60, "deepspeed_shm_comm": 50, "fused_adam": 60, "async_io": 40, "pin_memory": 30}
"""To compile one, of the order seen on two cores."""
BYTES = 2 * 10**9  # a compiler of torch's headers takes 1.9 GB
FILES = 2  # the fewest of an operator: so many compilers it has work for by itself
CGROUP = Path("/sys/fs/cgroup")
ROOT = Path(__file__).parents[2]


def compilers() -> int:
    """How many may run at the same time: MAX_JOBS where the user has set it, else one a core as far as memory goes."""
    said = os.environ.get("MAX_JOBS", "")
    if said.isdigit() and int(said):  # words torch passes over too, and 0 is without end to ninja
        return int(said)
    return max(1, min(len(os.sched_getaffinity(0)), _free_bytes() // BYTES))


def _free_bytes() -> int:
    """Memory that is free on this host, as far as its container is allowed it."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit, held = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - held))
    return free


def at_once(names: Sequence[str]) -> int:
    """How many of these operators are compiled at the same time. Two where one would leave compilers without work."""
    return max(1, min(len(names), compilers() // FILES))


def usual_seconds(names: Sequence[str]) -> int:
    """What compiling them takes, of the order: the longest where all are compiled at the same time, else the sum."""
    seconds = [SECONDS.get(name, 60) for name in names]
    return max(seconds, default=0) if at_once(names) == len(names) else sum(seconds)


def compile_together(names: Sequence[str]) -> None:
    """Compile them in processes of their own where more than one goes at a time. One that fails is none of ours: the
    engine compiles what is missing in its turn, and shows the error."""
    count = at_once(names)
    if count < 2:
        return
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"TORCH_EXTENSIONS_DIR": str(operator_folder()), "MAX_JOBS": str(compilers() // count), "PYTHONPATH": path}
    running: list[subprocess.Popen] = []
    try:
        for name in names:
            if len(running) == count:
                running[0].wait()
                del running[0]
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "diffdpo.engine.operator_child", name],
                    env={**os.environ, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    preexec_fn=die_with_parent,
                )
            )
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()
