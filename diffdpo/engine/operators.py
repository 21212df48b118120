"""DeepSpeed's compiled operators: which a run loads, whether they are there, and who holds them up.

torch compiles an operator once a machine, under a lock that it never says a word about (`locks`).
"""

import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffdpo.engine.deepspeed import import_deepspeed
from diffdpo.engine.locks import wait_for
from diffdpo.engine.world import World
from diffdpo.errors import UserError


def prepare_operators(ds_config: Mapping[str, Any], world: World, say: Callable[[str], None]) -> None:
    """Say what DeepSpeed will compile and what it waits for; wait for locks that others hold, remove abandoned ones.

    Every rank calls. UserError when an operator cannot be compiled here.
    """
    needed = needed_operators(ds_config)
    if missing := missing_operators(needed):
        names = ", ".join(missing)
        say(f"compiling DeepSpeed's operators ({names}): once on this machine, two to three minutes")
    for lock in locked_operators(needed) if world.local_rank == 0 else ():
        wait_for(lock, say)
    world.barrier()  # no rank may take a lock before these have been looked at


def needed_operators(ds_config: Mapping[str, Any]) -> list[str]:
    """DeepSpeed's compiled operators that this run loads."""
    needed = [] if torch.cuda.is_available() else ["deepspeed_shm_comm"]
    zero, params = ds_config.get("zero_optimization", {}), ds_config.get("optimizer", {}).get("params", {})
    if not params.get("torch_adam"):
        on_host = zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
        needed.append("cpu_adam" if on_host else "fused_adam")
    if "nvme" in (zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")):
        needed += ["pin_memory", "async_io"]
    return needed


def missing_operators(needed: Sequence[str]) -> list[str]:
    """Those of them that are not in torch's extension cache, or there for another environment: its cache is shared by
    all environments of a user and holds what the last one compiled. Those that DeepSpeed was
    installed with are not missing.

    UserError when they cannot be compiled here (no C++ compiler, no Python headers, for a GPU's Adam no CUDA toolkit).
    """
    to_compile = [name for name in needed if not _is_installed(name)]
    missing = [name for name in to_compile if not any(map(_is_current, _extension_root().glob(f"**/{name}/{name}.so")))]
    if missing and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++") if name):
        raise UserError("DeepSpeed compiles its CPU operators once and finds no C++ compiler; install g++")
    if missing and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise UserError("DeepSpeed compiles its CPU operators once and finds no Python.h; install python3-dev")
    if torch.cuda.is_available() and "fused_adam" in missing and not _has_cuda_toolkit():
        raise UserError(
            "DeepSpeed compiles its Adam for the GPU and finds no CUDA toolkit; install it and set CUDA_HOME, or put "
            '"optimizer": {"params": {"torch_adam": true}} into --ds_config'
        )
    return missing


def _is_installed(name: str) -> bool:
    """Whether DeepSpeed's own installation holds it, compiled for the kind of device that there is (DS_BUILD_...)."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    return installed_ops.get(name, False) and accelerator_name == get_accelerator()._name


def _is_current(library: Path) -> bool:
    """Whether it was built, to the end, by the instructions for this environment's DeepSpeed."""
    package = find_spec("deepspeed")
    assert package is not None and package.submodule_search_locations is not None, "a dependency of ours"
    try:
        instructions = library.with_name("build.ninja")
        ours = package.submodule_search_locations[0] in instructions.read_text()
        return ours and instructions.stat().st_mtime <= library.stat().st_mtime
    except FileNotFoundError:
        return False


def _has_cuda_toolkit() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None


def locked_operators(names: Sequence[str]) -> list[Path]:
    """Locks of operators that some process compiles or loads, or was killed while it did."""
    return [lock for name in names for lock in _extension_root().glob(f"**/{name}/lock")]


def _extension_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
