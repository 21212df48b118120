"""What stands in a tar, member by member, by webdataset's rules; and the damage that ``tarfile`` passes over.

``tarfile`` takes a cut or overwritten header for the end of the archive, and believes what a header claims of its size.
An archive that is whole ends in 1,024 zero bytes and at most fills up a record of 10,240 with more of them, so whatever
else stands behind the last member is told.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_pipeline.endings import other_content

BLOCK = 512
END_OF_ARCHIVE = 2 * BLOCK  # zero bytes that must follow the last member
RECORD = 20 * BLOCK  # tar writes whole records of this size: the rest of the last is zeros
CHUNK = 1 << 20
LARGEST = (1 << 32) - 1  # bytes of a member: what the index can hold
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's: the key ends at the first dot of the last part


@dataclass(frozen=True)
class Bad:
    """Something in a shard that is not a record, or is damage. ``key`` is empty for what concerns the whole shard."""

    kind: str
    key: str
    detail: str


@dataclass(frozen=True)
class Member:
    """A ``.json`` of a shard: its key, where its bytes lie, and the bytes."""

    key: str
    offset: int
    raw: bytes


class _Bounded:
    """A file that gives at most what is there: ``tarfile`` asks for as much as a header claims, be it a terabyte."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.size = file, size

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            raise tarfile.HeaderError("a header claims a size below nothing")
        return self.file.read(min(count, max(0, self.size - self.file.tell())))

    def seek(self, place: int) -> int:
        return self.file.seek(min(place, self.size))

    def tell(self) -> int:
        return self.file.tell()


def read_members(path: Path) -> Iterator[Member | Bad]:
    """The members of a plain tar in order, and all that is not one. Folders alone are passed over in silence."""
    if fault := other_content(path):
        yield Bad("tar_error", "", fault)
        return
    size = os.path.getsize(path)
    end = 0
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=_Bounded(file, size), mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all: 1 kB a record
                    back, end = file.tell(), info.offset_data + _in_blocks(info)
                    if item := _member(info, file, size):
                        yield item
                    if info.size < 0:  # the next header would lie before this one, for ever
                        raise tarfile.HeaderError("a header claims a size below nothing")
                    file.seek(back)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError) as error:
            if size:
                yield Bad("tar_error", "", f"{error}")
        yield from _tail(file, end, size)


def _in_blocks(info: tarfile.TarInfo) -> int:
    """Bytes that a member takes up behind its header: those of links, folders and devices have none."""
    return -(-info.size // BLOCK) * BLOCK if info.isreg() else 0


def _member(info: tarfile.TarInfo, file: IO[bytes], size: int) -> Member | Bad | None:
    if info.isdir():
        return None
    found = NAME.fullmatch(info.name)
    key, extension = found.groups() if found else (info.name, "")
    if not info.isreg() or info.issparse():
        what = "a link" if info.islnk() or info.issym() else "a sparse file" if info.issparse() else "no plain file"
        return Bad("foreign_member", key, f"{info.name}: {what}; a record is one .json member")
    if extension.lower() != "json":
        return Bad("foreign_member", key, f"{info.name}: no record, which is one member KEY.json whose key has no dot")
    if not 0 <= info.size <= size - info.offset_data:
        there = max(0, size - info.offset_data)
        return Bad("truncated", key, f"the header claims {info.size} bytes, {there} are there")
    if info.size > LARGEST:
        return Bad("too_large", key, f"{info.size} bytes, {LARGEST} are the most of a record")
    file.seek(info.offset_data)
    return Member(key, info.offset_data, file.read(info.size))


def _tail(file: IO[bytes], end: int, size: int) -> Iterator[Bad]:
    file.seek(min(max(end, 0), size))
    first = file.read(END_OF_ARCHIVE)
    if len(first) < END_OF_ARCHIVE or first.strip(b"\0"):
        yield Bad("no_end_of_archive", "", f"damaged or cut after byte {end} of {size}")
        return
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            place = file.tell() - len(chunk.lstrip(b"\0"))
            yield Bad("data_behind_end", "", f"behind the end of the archive at byte {end} data go on at {place}")
            return
    whole = -(-(end + END_OF_ARCHIVE) // RECORD) * RECORD
    if size > whole:
        yield Bad("zero_filled_tail", "", f"{size - end} zero bytes from byte {end} on, {whole - end} are the most")
