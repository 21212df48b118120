"""Files behind URLs (http(s), s3, hf, anything fsspec knows): fetched whole into a local cache, once, with retries.

A fetched file appears under its final name only when it is complete, so several processes may ask for it at once.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from glob import has_magic
from pathlib import Path
from urllib.parse import urlparse

from filelock import FileLock

from data_pipeline.addresses import hidden, hidden_of
from data_pipeline.errors import DataError
from data_pipeline.files import whole_or_absent

log = logging.getLogger(__name__)

RETRIES = 5
BACKOFF_SECONDS = 0.5  # doubled after each failure: 0.5, 1, 2, 4
CHUNK = 1 << 20


class AbsentError(DataError):
    """There is no such file, as the other side says."""


def is_remote(source: str) -> bool:
    """True for URLs of another scheme than file."""
    return "://" in source and not source.startswith("file://")


def without_scheme(source: str) -> str:
    """A path for a file:// URL of this machine; anything else as it is."""
    return source.removeprefix("file://")


def is_glob(source: str) -> bool:
    """True when * ? or [ in it stand for any letters. In a web address ? begins the query and [ is no pattern."""
    return "*" in source.split("?")[0] if source.startswith(("http://", "https://")) else has_magic(source)


def default_cache_dir() -> Path:
    """``$DIFFDPO_CACHE``, or ``~/.cache/diffdpo``."""
    return Path(os.environ.get("DIFFDPO_CACHE") or Path.home() / ".cache" / "diffdpo")


def cache_path(url: str, cache_dir: Path | None, version: str = "") -> Path:
    """Where the cached copy of a URL lies: the whole URL (and version) decides, the name is kept readable."""
    digest = hashlib.blake2b((url + version).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    name = Path(urlparse(url).path).name or "file"
    return (cache_dir or default_cache_dir()) / "files" / digest / name


def cached_file(
    url: str,
    cache_dir: Path | None = None,
    *,
    size: int | None = None,
    version: str = "",
    fresh: bool = False,
    retries: int = RETRIES,
    backoff: float = BACKOFF_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The local copy of ``url``, fetched if it is not there (or anyway, ``fresh``).

    With ``size``, a copy of another length is an error. Copies of different ``version`` (the sha256 an index knows)
    are kept apart, so that a shard that was built anew is fetched anew.

    Raises AbsentError when there is no such file, DataError when the URL stays unreachable after ``retries`` attempts
    with doubling pauses.
    """
    target = cache_path(url, cache_dir, version)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # one process of a machine fetches, the others find it
        if fresh or not target.exists() or size not in (None, target.stat().st_size):
            _fetch_with_retries(url, target, size, retries, backoff, sleep)
    return target


def _fetch_with_retries(
    url: str, target: Path, size: int | None, retries: int, backoff: float, sleep: Callable[[float], None]
) -> None:
    for attempt in range(1, retries + 1):
        try:
            with whole_or_absent(target) as partial:
                _fetch(url, partial)
                if size not in (None, partial.stat().st_size):
                    raise OSError(f"{partial.stat().st_size} bytes came, {size} expected")
            return
        except ImportError as error:
            raise DataError(f"{url}: {error}; for s3:// run: pip install s3fs") from error
        except Exception as error:  # each protocol has its own family of network errors
            if _is_absent(error):
                raise AbsentError(f"{url} does not exist") from error
            if attempt == retries:
                raise DataError(f"{url} is unreachable after {retries} attempts: {_reason(error, url)}") from error
            pause = backoff * 2 ** (attempt - 1)
            log.warning(
                "%s: %s; attempt %d of %d, next in %.1f s", hidden(url), _reason(error, url), attempt, retries, pause
            )
            sleep(pause)
    raise DataError(f"{url}: retries must be at least 1, found {retries}")


def _is_absent(error: Exception) -> bool:
    """True when the other side says that there is no such file. fsspec's http raises FileNotFoundError for a refused
    connection and a busy server as well; then the true error is its cause, and worth another attempt."""
    cause = error.__cause__
    while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:  # fsspec wraps those of a ? twice
        cause = cause.__cause__
    masked = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError) and (not masked or getattr(cause, "status", 0) in (404, 410))


def _reason(error: Exception, url: str) -> str:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return hidden_of(url, f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]


def _fetch(url: str, target: Path) -> None:
    import fsspec

    with fsspec.open(url, "rb") as source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)


def expand_remote(pattern: str) -> Sequence[str]:
    """The URLs a pattern with * or ? stands for, sorted. Protocols that cannot list raise DataError."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        found = sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
    except Exception as error:  # as above
        raise DataError(
            f"{pattern} cannot be listed ({_reason(error, pattern)}); name the shards: shard-{{00000..00009}}.tar"
        ) from error
    if not found:
        raise DataError(f"{pattern} matches nothing")
    return found
