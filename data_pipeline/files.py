"""Files that are whole or absent: written beside their place, forced to the disk, moved there by one rename."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_absent(path: Path, *, forced: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; when the block ends, what stands there becomes ``path``. When it fails, what
    was written goes, and an earlier ``path`` stays. Several processes, also on several hosts, may do this at once: each
    has a name of its own. ``forced``: false for what nobody reads after a power cut.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield partial
        if forced:
            force_to_disk(partial)  # else a power cut may leave the new name with no content
        partial.replace(path)
        if forced:
            force_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, forced: bool = True) -> None:
    """Write a small file so that it is whole or absent at any moment."""
    with whole_or_absent(path, forced=forced) as partial:
        partial.write_bytes(data)


def force_to_disk(path: Path) -> None:
    """Wait until a file (or the names in a folder) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
