"""Where DeepSpeed's compiled operators are kept, and how they are loaded from there without asking a compiler.

torch's own cache knows an operator by its name alone: two environments of a user, or two versions of ninja, compile it
over each other at every run, for minutes. Here its folder is named after all that decides whether the library can be
loaded (torch, DeepSpeed, Python, the processor), so that every environment with the same versions shares one.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffdpo.errors import UserError


def use_kept(names: Sequence[str]) -> None:
    """Give DeepSpeed the operators that are there; what is not there or cannot be loaded it compiles, into the same
    folder."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    os.environ["TORCH_EXTENSIONS_DIR"] = str(operator_folder())
    for name in names:
        library = _library(name)
        if name in OpBuilder._loaded_ops or library.with_name("lock").exists():
            continue  # another process may be linking it: torch waits
        if library.exists() and not _is_whole(library):
            _remove(library)  # ninja would take it for the result
        if kept(name) is None:
            continue
        try:
            OpBuilder._loaded_ops[name] = _load(name, library)
        except (ImportError, OSError):  # by a compiler unlike ours, or no library at all
            _remove(library)


def kept(name: str) -> Path | None:
    """The compiled library, if it was built to the end: it is newer than the instructions to build it, and whole."""
    library = _library(name)
    try:
        newer = library.with_name("build.ninja").stat().st_mtime <= library.stat().st_mtime
        return library if newer and _is_whole(library) else None
    except OSError:  # not there, or not for us to see
        return None


def _is_whole(library: Path) -> bool:
    """Whether an ELF file is as long as its header says: the table of its sections comes last. What is missing of a
    library is no ImportError but a SIGBUS, when it is first touched. True for what is no ELF file of 64 bits."""
    with library.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"\x7fELF\x02"):
        return True
    if len(head) < 64:
        return False
    order: Any = "little" if head[5] == 1 else "big"
    start, size, count = (int.from_bytes(head[at:to], order) for at, to in ((40, 48), (58, 60), (60, 62)))
    return start + size * count <= library.stat().st_size


def _remove(library: Path) -> None:
    try:
        library.unlink(missing_ok=True)
    except OSError as fault:
        raise UserError(
            f"DeepSpeed's operator {library} is damaged and cannot be removed ({fault.strerror}); remove it, or set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from None


def _library(name: str) -> Path:
    return operator_folder() / name / f"{name}.so"


def operator_folder() -> Path:
    """In torch's folder for extensions (TORCH_EXTENSIONS_DIR), that of environments like this one."""
    from torch.utils.cpp_extension import get_default_build_root

    root, own = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), _kind_of_environment()
    return root if root.name == own else root / own


def _kind_of_environment() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # an operator has one name on both
    software = f"deepspeed{version('deepspeed')}-torch{torch.__version__}-{sys.implementation.cache_tag}"
    return f"{software}-{device}-{_processor()}"


@cache
def _processor() -> str:
    """What is compiled with -march=native on one host of a shared home must not be loaded on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        abilities = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        abilities = f"{platform.machine()} {platform.processor()}"
    return blake2b(" ".join(sorted(set(abilities.split()))).encode(), digest_size=4).hexdigest()


def _load(name: str, library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None, "a .so has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
