"""Whether the launcher that started this process still lives. Without it nobody ends the ranks, and they train on."""

import os
import threading
from collections.abc import Callable

import psutil

PAUSE_SECONDS = 1.0
PARENT = "DIFFDPO_PARENT"  # in the environment: the process that starts this one again (--max_restarts)
LEFT_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # torchrun's and DeepSpeed's, in the environment of a rank


def watch_launcher(on_death: Callable[[str], None]) -> None:
    """Call ``on_death(name)`` once, from a thread, when a launcher above this process has died.

    Nothing is watched where there is none: ``nohup python launch/train.py &`` is meant to outlive its shell.
    """
    watched = launchers()
    if above := os.environ.get(PARENT):  # --max_restarts'
        if os.getppid() != int(above):
            on_death("the process above it")
            return
        watched.append(psutil.Process(int(above)))
    if not watched and any(name in os.environ for name in LEFT_BY_LAUNCHERS):
        on_death("the launcher")  # it died while this process imported torch, which may take a minute
    if watched:
        threading.Thread(target=_watch, args=(watched, on_death), name="launcher", daemon=True).start()


def launchers() -> list[psutil.Process]:
    """The process that started this rank, and the one above it where two make up a launcher (DeepSpeed's)."""
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return []
    found = []
    for process in psutil.Process().parents()[:3]:
        try:
            command = " ".join(process.cmdline()) if "python" in os.path.basename(process.exe()) else ""
        except psutil.Error:  # of another user, or gone
            continue
        if any(word in command for word in ("torchrun", "torch.distributed", "deepspeed", "accelerate")):
            found.append(process)
    return found


def _watch(watched: list[psutil.Process], on_death: Callable[[str], None]) -> None:
    names = {process.pid: f"{process.name()} (process {process.pid})" for process in watched}
    waiting = threading.Event()
    while not waiting.wait(PAUSE_SECONDS):
        for process in watched:
            # a number is used again: psutil compares the time it was started at
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                on_death(names[process.pid])
                return
