"""What every command shares: a parser that fails in one line, and exit code 2 for a user's mistake."""

import importlib.util
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from typing import NoReturn

import data_pipeline.cli
from data_pipeline.errors import DataError
from diffdpo.errors import RESUMABLE, Stopped, TrainingError, UserError
from diffdpo.quiet import hush

SECONDS_BEHIND = 3.0
AT_KEYBOARD = 130  # the exit code after Ctrl-C
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True,pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
"""Rows differ in every step, which fragments fixed segments; and page-locked memory comes in powers of two unless told
otherwise, a quarter of the host's memory at 3B. Since torch 2.13."""


class Parser(data_pipeline.cli.Parser):
    """``argparse`` without abbreviations, whose errors are one line, also under a launcher."""

    def __init__(self, **options):
        super().__init__(**options)
        # "-5GiB" is a value, which its flag refuses by name; argparse sees values in plain negative numbers alone
        self._negative_number_matcher = re.compile(r"-[.\d]")

    def error(self, message: str) -> NoReturn:
        _wait_for_rank_0_to_speak()
        super().error(message)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a command's ``main(argv)`` and exit: 0, 2 with one line for a user's mistake, 1 with one line where a run
    could not go on, 3 where it was told to stop and can go on, 4 where it hung, 130 after Ctrl-C."""

    hush()
    set_allocator()
    for stream in (sys.stdout, sys.stderr):  # texts of any language on a terminal of any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def speak_in_turn(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except (UserError, DataError):
            _wait_for_rank_0_to_speak()
            raise
        except Stopped:
            return RESUMABLE
        except TrainingError as error:
            _wait_for_rank_0_to_speak()
            print(f"error: {error}", file=sys.stderr)
            return 1

    code = data_pipeline.cli.exit_code(speak_in_turn, sys.argv[1:], (UserError, DataError))
    _leave_behind_those_who_wait(code)
    sys.exit(code)


def set_allocator() -> None:
    """For torch, which reads it when it is imported; what the user has set stands."""
    version = re.match(r"(\d+)\.(\d+)", metadata.version("torch")) if _has_torch() else None
    if version and (int(version[1]), int(version[2])) >= (2, 13) and not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATORS[0]] = ALLOCATOR


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _leave_behind_those_who_wait(code: int) -> None:
    """End here and now where a thread would hold the interpreter's own end: MLflow's, in a request to a server that
    does not answer. Whatever it would send is in the run's folder."""
    if any(thread.name.startswith("mlflow") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_for_rank_0_to_speak() -> None:
    """A mistake is mostly met by every process. The launcher ends the others when the first has told of it; a process
    whose trouble is its own is still heard, a little later."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_BEHIND)
