"""Memory, processors and limits of this machine, or of the container that this is. No torch in here."""

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from diffdpo.doctor.finding import Finding, ok, warning

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
LITTLE_SHARED = 0.5  # GiB of /dev/shm: docker gives 0.06 unless told otherwise
LITTLE_HOST = 6  # GiB that the bundled model with DeepSpeed and its compiler are at ease with


def memory() -> Iterator[Finding]:
    """What there is and what is free, as the container is allowed it."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(meminfo[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    if limit := _limit("memory.max"):
        held = _limit("memory.current") or 0
        total, free = min(total, limit / GIB), min(free, (limit - held) / GIB)
    said = f"{free:.1f} of {total:.1f} GiB free" + (" (a container's)" if limit and limit / GIB <= total else "")
    if free < LITTLE_HOST:
        yield warning("host memory", said, "enough for small models; end other programs, or give the container more")
    else:
        yield ok("host memory", said)


def _limit(name: str) -> int | None:
    """A number of the control group; None where it sets none."""
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def processors() -> Iterator[Finding]:
    """How many this process may use, and a thread limit that keeps it from doing so."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota()
    said = f"{cores} cores" + (f", {quota:g} of them allowed by the container" if quota and quota < cores else "")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and (not threads.isdigit() or int(threads) < 1):
        yield warning("processors", f"{said}; OMP_NUM_THREADS is {threads!r}", "give a number, or unset it")
    elif threads == "1" and cores > 1:
        yield warning("processors", f"{said}; OMP_NUM_THREADS is 1", "unset it: Adam on the host runs on one core else")
    else:
        yield ok("processors", said + (f", OMP_NUM_THREADS {threads}" if threads else ""))


def _quota() -> float | None:
    try:
        allowed, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return int(allowed) / int(period) if allowed.isdigit() else None


def allocator() -> Iterator[Finding]:
    """Whose malloc: with glibc's a CPU run takes more memory than its tensors (docs/memory.md)."""
    mapped = Path("/proc/self/maps").read_text()
    if other := next((name for name in ("jemalloc", "mimalloc", "tcmalloc") if name in mapped), None):
        yield ok("malloc", other)
    elif platform.libc_ver()[0] == "glibc":
        yield ok("malloc", "glibc's; with libjemalloc2 in LD_PRELOAD a run on the CPU took 0.99 GB in place of 1.38")


def locked_memory() -> Iterator[Finding]:
    """`ulimit -l`: what may be kept from being swapped out, by InfiniBand and by DeepSpeed's reader of NVMe."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        yield ok("locked memory", "unlimited")
        return
    said = f"{limit / 2**20:.0f} MiB (ulimit -l)"
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        yield warning("locked memory", said, "InfiniBand needs it unlimited: ulimit -l unlimited, or limits.conf")
    else:
        yield ok("locked memory", f"{said}; InfiniBand and NVMe offload want more, CUDA's own does not count")


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which processes of a host (loaders, NCCL, gloo) hand over data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield warning("/dev/shm", "not there", "several processes on this host will fail; mount a tmpfs there")
        return
    state = os.statvfs(folder)
    size = state.f_frsize * state.f_bavail / GIB
    if size < LITTLE_SHARED:
        yield warning("/dev/shm", f"{size:.2f} GiB free", "several processes need more; docker run --shm-size 8g")
    else:
        yield ok("/dev/shm", f"{size:.1f} GiB free")
