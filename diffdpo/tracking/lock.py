"""One run, one folder: a lock that the kernel drops when its holder dies, however it dies."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffdpo.errors import UserError

if TYPE_CHECKING:
    from diffdpo.engine.world import World  # torch is not needed to see whether a run lives

FILE = "run.lock"


@contextmanager
def one_run_in(output_dir: Path, world: "World") -> Iterator[None]:
    """Hold the folder. UserError, on every rank, where a living run has it. What was made for the lock goes with it."""
    held, refusal = None, None
    if world.is_main:
        try:
            held = _take(output_dir)
        except UserError as error:
            refusal = str(error)
    if refusal := world.broadcast(refusal):
        raise UserError(refusal)
    try:
        yield
    finally:
        if held is not None:
            _release(held, output_dir)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder alone, for a process that is no rank, such as that of a sweep."""
    held = _take(folder)
    try:
        yield
    finally:
        _release(held, folder)


def _take(output_dir: Path) -> int:
    """The locked file. A lock is on a file, not on a name: the holder before us may just have removed it."""
    path = output_dir / FILE
    while True:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and error.filename == str(path)
            if gone and not path.is_symlink():
                continue  # the folder has gone again
            raise UserError(
                f"--output_dir {output_dir}: {FILE} cannot be made there ({error.strerror}: {error.filename}); "
                "give a folder that can be written to"
            ) from None
        _lock(file, output_dir)
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}\n".encode(), 0)
            return file
        os.close(file)


def _lock(file: int, output_dir: Path) -> None:
    """UserError, and the file closed, where it cannot be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        os.close(file)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"--output_dir {output_dir}: its filesystem has no locks ({error.strerror}), and two runs in one "
                "folder would spoil each other; give a folder on another filesystem"
            ) from None
        raise UserError(
            f"--output_dir {output_dir} is in use by a living run ({holder}); stop it, or give another folder"
        ) from None


def _release(file: int, output_dir: Path) -> None:
    with suppress(OSError):
        (output_dir / FILE).unlink()
        output_dir.rmdir()  # only where nothing was written: a mistake leaves nothing behind
    os.close(file)


def is_held(output_dir: Path) -> bool:
    """Whether a living run has the folder."""
    try:
        file = os.open(output_dir / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
