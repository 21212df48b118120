"""A command of a round in a process of its own, which ends with who started it: its memory is free before the next."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from diffdpo.children import die_with_parent
from diffdpo.errors import RESUMABLE, Stopped, TrainingError, UserError


def run_stage(name: str, argv: Sequence[str], *, launcher: str | None) -> None:
    """Run ``diffdpo ARGV``; its words go to the same screen. SIGTERM is handed on. UserError, Stopped or TrainingError
    by how it ends."""
    command = [*command_of(launcher), *argv]
    try:
        process = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as error:
        raise UserError(f"launcher {launcher!r} cannot be run: {error.strerror}") from None

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has told the child too
        code = process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == RESUMABLE:
        raise Stopped
    if code == 2:
        raise UserError(f"{name} ended with exit code 2; what it says above is to be mended, then run this again")
    if code:
        raise TrainingError(f"{name} ended with exit code {code}; what is done is kept: run this again to go on")


def command_of(launcher: str | None) -> list[str]:
    """What comes before ``train`` and ``make-pairs``."""
    words = shlex.split(launcher or "")
    if not words:
        return [sys.executable, "-m", "diffdpo"]
    return [*words, "--module" if "deepspeed" in os.path.basename(words[0]) else "-m", "diffdpo"]
