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


def use_kept(names: Sequence[str]) -> None:
    """Give DeepSpeed the operators that are there; what is not there or cannot be loaded it compiles, into the same
    folder."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    os.environ["TORCH_EXTENSIONS_DIR"] = str(operator_folder())
    for name in names:
        library = kept(name)
        if library is None or library.with_name("lock").exists():  # another process may be linking it: torch waits
            continue
        if name not in OpBuilder._loaded_ops:
            try:
                OpBuilder._loaded_ops[name] = _load(name, library)
            except (ImportError, OSError):  # written half when its linker was killed, or by a compiler unlike ours
                library.unlink(missing_ok=True)


def kept(name: str) -> Path | None:
    """The compiled library, if it was built to the end: it is newer than the instructions to build it."""
    library = operator_folder() / name / f"{name}.so"
    try:
        whole = library.with_name("build.ninja").stat().st_mtime <= library.stat().st_mtime
    except FileNotFoundError:
        return None
    return library if whole else None


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
