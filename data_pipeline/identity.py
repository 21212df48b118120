"""What a file holds, as a digest: the identity of input, whatever its name, size and time.

A file is read through once; the digest is kept in the cache under what the file system says of the file. Its size and
the time of its last change can be set at will; the time at which the file system last touched its entry (ctime) cannot,
so a file with another content is never taken for the one that was read.
"""

import hashlib
import time
from pathlib import Path

from data_pipeline.files import write_whole
from data_pipeline.remote import default_cache_dir

SETTLED_SECONDS = 2.0  # a file changed since then may be changed again within one tick of the file system's clock


def content_digest(path: Path, cache_dir: Path | None) -> str:
    """16 hex digits of a file's content."""
    known = _state(path)
    name = hashlib.blake2b(f"{path.resolve()} {known}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    kept = (cache_dir or default_cache_dir()) / "digests" / name
    if kept.exists() and (digest := kept.read_text()):
        return digest
    digest = _read_through(path)
    if time.time() - path.stat().st_ctime > SETTLED_SECONDS and _state(path) == known:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, digest.encode())
    return digest


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_through(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
