"""Locks in the cache of torch's extensions: is whoever took one still at work?

torch makes a file `lock` in an extension's folder, holds it open while it compiles or loads, and removes it
(torch.utils.file_baton). A process that is killed leaves it behind, and every later one waits for it for ever.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

LOADING_SECONDS, ABANDONED_SECONDS = 10, 1800  # ages of a lock: longer than it takes to load, and to compile
PAUSE_SECONDS = 1.0
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay"}  # filesystems of one machine
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # Linux's PROC_PID_INIT_INO: who is in it sees all processes of the machine


def wait_for(lock: Path, say: Callable[[str], None]) -> None:
    """Return when the lock is gone: released, or removed as nobody works under it any more."""
    told = False
    with suppress(FileNotFoundError):  # released
        while True:
            age = time.time() - lock.stat().st_mtime
            if remove_if_abandoned(lock):
                say(f"  removed {lock}: the process that took it {_in_words(age)} ago must have been killed")
                return
            if age > LOADING_SECONDS and not told:
                say(f"  waiting for a compilation begun {_in_words(age)} ago; if nothing compiles, remove {lock}")
                told = True
            time.sleep(PAUSE_SECONDS)


def remove_if_abandoned(lock: Path) -> bool:
    """Remove a lock nobody works under: where that can be known as soon as it is so, elsewhere when it is too old to be
    of a living compilation. FileNotFoundError when it has been released."""
    folder = os.open(lock.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network's filesystem may have no such locks; there only age tells anyway
            fcntl.flock(folder, fcntl.LOCK_EX)  # else another run could remove it, and we the one taken after that
        age = time.time() - lock.stat().st_mtime
        if any(_works_under(process, lock) for process in _processes()):
            return False
        if not (sees_who_took(lock) or age > ABANDONED_SECONDS):
            return False
        lock.unlink()
        return True
    finally:
        os.close(folder)


def sees_who_took(lock: Path) -> bool:
    """Whether a living process that took the lock would be among those that we can look at: it runs on this machine
    (the folder is no network's), in a container none but ours has the folder, and it is our user's."""
    try:
        mount_point, kind = _mount_of(lock.parent)
        outside_containers = os.readlink("/proc/self/ns/pid") == FIRST_PID_NAMESPACE
    except OSError:  # no Linux
        return False
    ours = os.getuid() in (0, lock.stat().st_uid)
    return ours and kind in LOCAL and (outside_containers or mount_point == Path("/"))


def _mount_of(folder: Path) -> tuple[Path, str]:
    """(mount point, kind) of the filesystem that a folder lies in."""
    folder, found = folder.resolve(), (Path("/"), "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        mount_point = Path(place.split()[4].replace("\\040", " "))
        if folder.is_relative_to(mount_point) and len(mount_point.parts) >= len(found[0].parts):
            found = mount_point, kind.split()[0]  # of two at one place the later hides the earlier
    return found


def _processes() -> Iterator[Path]:
    return (path for path in Path("/proc").glob("[0-9]*"))


def _works_under(process: Path, lock: Path) -> bool:
    """Whether it has the lock open, or works in its folder (a compiler goes on when the one who called it is killed).
    False for a process of another user, whose doings are hidden, and for one that has ended."""
    with suppress(OSError):
        if (process / "cwd").readlink() == lock.parent.resolve():
            return True
        return any(_is_open_as(file, lock) for file in (process / "fd").iterdir())
    return False


def _is_open_as(file: Path, lock: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        return file.readlink().name == lock.name and file.samefile(lock)
    return False


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
