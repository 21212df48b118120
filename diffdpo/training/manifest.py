"""What a folder's files must be, to the bit: sizes and SHA-256 in ``manifest.json``, which carries a sum of its own.

A folder is sound when its manifest is, and every file is as it says, and there is no other. All of it is looked at
before any file is opened for its content. The ranks share the reading, so the folder must be one that all see.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffdpo.engine.world import World

MANIFEST = "manifest.json"
VERSION = 1
PIECE = 1 << 20


@dataclass(frozen=True)
class FileSum:
    """A file's size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


def sums_of_share(folder: Path, world: World) -> dict[str, FileSum]:
    """The sums of this rank's share of the files, which then survive a power cut. OSError where the disk fails."""
    names = files_of(folder)[world.rank :: world.size]
    return {name: _sum_of(folder / name, sync=True) for name in names}


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """The manifest, and all names in the folder, on the disk."""
    content: dict[str, Any] = {"version": VERSION, "files": {name: asdict(sums[name]) for name in sorted(sums)}}
    with (folder / MANIFEST).open("wb") as file:
        file.write(_as_bytes(content | {"sha256": _sum_of_content(content)}))
        file.flush()
        os.fsync(file.fileno())
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(inner)


def fault_of(folder: Path, world: World) -> str | None:
    """What is wrong with a folder; None when it is sound. Every rank calls and hears the same."""
    found = _fault_of_share(folder, world.rank, world.size)
    return next((fault for fault in world.all_gather_object(found) if fault), None)


def _fault_of_share(folder: Path, rank: int, size: int) -> str | None:
    try:
        sums = read_manifest(folder)
        if more := [name for name in files_of(folder) if name not in sums and not Path(name).name.startswith(".")]:
            return f"{more[0]} is in no manifest"
        for name in sorted(sums)[rank::size]:
            if fault := _fault_of_file(folder / name, sums[name]):
                return f"{name} {fault}"
    except (OSError, ValueError) as error:
        return f"{error}"
    return None


def _fault_of_file(path: Path, expected: FileSum) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected.size:
        return f"is empty, not {expected.size} bytes" if not size else f"has {size} bytes, not {expected.size}"
    return None if _sum_of(path) == expected else "is damaged (its checksum is another)"


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """File names (below the folder) and their sums. ValueError when it is missing, damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        as_written, told = _as_bytes(content), content.pop("sha256")
        files = {name: FileSum(**entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged or empty") from None
    if told != _sum_of_content(content) or raw != as_written:
        raise ValueError(f"{MANIFEST} is damaged (its checksum is another)")
    if content["version"] != VERSION:
        raise ValueError(f"{MANIFEST} is of version {content['version']}, not {VERSION}")
    return files


def files_of(folder: Path) -> list[str]:
    """All files below a folder but its manifest, by name."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def _sum_of(path: Path, *, sync: bool = False) -> FileSum:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return FileSum(size, digest.hexdigest())


def _sum_of_content(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_as_bytes(content)).hexdigest()


def _as_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder and all in it survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


def publish(partial: Path, final: Path) -> None:
    """One rename makes a finished folder appear whole; what stood there before goes."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
