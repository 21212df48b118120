"""Disks: where outputs, caches and NVMe offload go; whether there is room, whether they can be written, how fast."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from diffdpo.doctor.finding import Finding, error, ok, warning

GIB = 2**30
CHUNK = 8 * 2**20
MOST, LONGEST = 128 * 2**20, 0.4  # bytes and seconds of a measurement
LITTLE = 2  # GiB
SLOW = 50e6  # bytes/s


def outputs(folder: Path | None) -> Iterator[Finding]:
    """Where runs go; a ``folder`` that was named must do."""
    where = folder or Path("outputs")
    yield _folder("outputs", where, advice="give another --output_dir", must=folder is not None)


def nvme(folder: Path | None) -> Iterator[Finding]:
    """Where --ds_config offloads to, if that was named."""
    if folder is None:
        return
    advice = 'name another in "nvme_path" of --ds_config'
    if not folder.exists():
        yield error("NVMe offload", f"{folder} is not there", f"make it, or {advice}")
        return
    from diffdpo.engine.preflight import nvme_fault  # what a run would say

    if fault := nvme_fault(str(folder)):
        yield error("NVMe offload", f'"nvme_path" {fault}', advice)
    else:
        yield _folder("NVMe offload", folder, advice=advice, must=True)


def caches() -> Iterator[Finding]:
    """Where models and compiled code are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{home}/huggingface"
    yield _folder("model cache", Path(os.path.expanduser(hub)), advice="set HF_HOME to a folder with room", must=False)
    asked, advice = os.environ.get("TMPDIR"), "set TMPDIR to a folder that can be written"
    if asked and not os.path.isdir(asked):  # neither Python nor a compiler says so: they take another
        yield warning("TMPDIR", f"{asked} is not a folder: temporary files go to /tmp", f"make it, or {advice}")
        asked = None
    yield _folder("temporary files", Path(asked or "/tmp"), advice=advice, must=False)


def _folder(name: str, folder: Path, *, advice: str, must: bool) -> Finding:
    fault = error if must else warning
    folder = folder.absolute()
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as failure:
        return fault(name, f"{folder}: {failure.strerror}", advice)
    if not existing.is_dir():
        return fault(name, f"{existing} is a file", advice)
    state = os.statvfs(existing)
    free = state.f_frsize * state.f_bavail / GIB
    try:
        rate = _writing(existing)
    except OSError as failure:
        return fault(name, f"{folder}: nothing can be written ({failure.strerror}), {free:.1f} GiB free", advice)
    said = f"{folder}: {free:.1f} GiB free, {rate / 1e6:.0f} MB/s written"
    if free < LITTLE:
        return fault(name, said, f"make room, or {advice}")
    if rate < SLOW:
        return warning(name, said, f"checkpoints of large models take long here; {advice}")
    return ok(name, said)


def _writing(folder: Path) -> float:
    """Bytes/s to the disk, of a file that is gone afterwards. OSError where nothing can be written."""
    block, written, start = os.urandom(CHUNK), 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < MOST and time.perf_counter() - start < LONGEST:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written += CHUNK
    return written / (time.perf_counter() - start)
