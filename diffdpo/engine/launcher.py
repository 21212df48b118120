"""Whether the launcher that started this process still lives. Without it nobody ends the ranks, and they train on."""

import os
import threading
from collections.abc import Callable

import psutil

PAUSE_SECONDS = 1.0
PARENT = "DIFFDPO_PARENT"  # in the environment: the process that starts this one again (--max_restarts)
ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init")  # parents of those whose parent has died
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
    left = not watched and any(name in os.environ for name in LEFT_BY_LAUNCHERS)
    if left or any(is_left_alone(process) for process in watched):
        on_death("the launcher")  # it died while this process, or the one between, imported torch: up to a minute
    elif watched:
        threading.Thread(target=_watch, args=(watched, on_death), name="launcher", daemon=True).start()


def launchers() -> list[psutil.Process]:
    """The process that started this rank, and the one above it where two make up a launcher (DeepSpeed's)."""
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return []
    words = ("torchrun", "torch.distributed", "deepspeed", "accelerate")
    return [process for process in psutil.Process().parents()[:3] if any(word in _command(process) for word in words)]


def is_left_alone(process: psutil.Process) -> bool:
    """Whether it is the lower one of DeepSpeed's two launchers, and its parent is the system: the upper one has died.

    Nobody starts the lower one by hand: its arguments are in base64.
    """
    if "deepspeed.launcher.launch" not in _command(process):
        return False
    parent = process.parent()
    return parent is not None and "deepspeed" not in _command(parent) and (parent.pid == 1 or parent.name() in ADOPTERS)


def _command(process: psutil.Process) -> str:
    """The command line of a Python program; nothing of others."""
    try:
        return " ".join(process.cmdline()) if "python" in os.path.basename(process.exe()) else ""
    except psutil.Error:  # of another user, or gone
        return ""


def _watch(watched: list[psutil.Process], on_death: Callable[[str], None]) -> None:
    names = {process.pid: f"{process.name()} (process {process.pid})" for process in watched}
    waiting = threading.Event()
    while not waiting.wait(PAUSE_SECONDS):
        for process in watched:
            # a number is used again: psutil compares the time it was started at
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                on_death(names[process.pid])
                return
