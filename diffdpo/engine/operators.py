"""DeepSpeed's compiled operators: which a run loads, whether they are there, and who holds them up.

torch compiles an operator under a lock that it never says a word about (`locks`); `operator_cache` says where.
"""

import ast
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffdpo.engine.locks import wait_for
from diffdpo.engine.operator_build import compile_together, compilers, usual_seconds
from diffdpo.engine.operator_cache import kept, operator_folder
from diffdpo.engine.world import World
from diffdpo.errors import UserError


def prepare_operators(ds_config: Mapping[str, Any], world: World, say: Callable[[str], None]) -> None:
    """Say what DeepSpeed will compile and what it waits for; wait for locks that others hold, remove abandoned ones.

    Every rank calls. UserError when an operator cannot be compiled here.
    """
    needed = needed_operators(ds_config)
    if missing := missing_operators(needed):
        names, seconds = ", ".join(missing), usual_seconds(missing)
        say(f"compiling DeepSpeed's operators ({names}): once on this machine, about {seconds} s")
        os.environ["MAX_JOBS"] = str(compilers())
    if world.local_rank == 0:
        _wait_for_locks(needed, say)
        compile_together(missing_operators(needed))  # who held a lock may have compiled some
        _wait_for_locks(needed, say)  # a process of ours that was killed, for memory perhaps, has left its own
    world.barrier()  # no rank may take a lock before these have been looked at


def _wait_for_locks(names: Sequence[str], say: Callable[[str], None]) -> None:
    for lock in locked_operators(names):
        wait_for(lock, say)


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
    """The operators that nobody has compiled for environments like this one, and DeepSpeed was not installed with.

    UserError when they cannot be compiled here (no folder that can be written, no C++ compiler, no Python headers, for
    a GPU no CUDA toolkit, or one of another major version than torch's).
    """
    to_compile = [name for name in needed if not _is_installed(name)]
    missing = [name for name in to_compile if kept(name) is None]
    if not all(_can_be_written(operator_folder() / name) for name in missing):
        raise UserError(
            f"DeepSpeed compiles its operators once and cannot write them to {operator_folder()}; "
            "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        )
    if missing and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++") if name):
        raise UserError("DeepSpeed compiles its CPU operators once and finds no C++ compiler; install g++")
    if missing and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise UserError("DeepSpeed compiles its CPU operators once and finds no Python.h; install python3-dev")
    for name in missing if torch.cuda.is_available() else ():
        if name in WITH_TOOLKIT and (fault := toolkit_fault()):
            what, instead = WITH_TOOLKIT[name]
            raise UserError(f"DeepSpeed compiles {what} and {fault}; {instead}")
    return missing


WITH_TOOLKIT = {
    "fused_adam": (
        "its Adam for the GPU",
        'install it and set CUDA_HOME, or put "optimizer": {"params": {"torch_adam": true}} into --ds_config',
    ),
    "async_io": (
        "its reader and writer of NVMe against CUDA's libraries",
        "install it and set CUDA_HOME, or offload to the cpu in --ds_config",
    ),
}
"""Operators that take a CUDA toolkit to compile: for the user, what they are and what to do without one."""


def toolkit_fault() -> str | None:
    """What is wrong with the CUDA toolkit that torch's extensions would be compiled with; None where nothing is."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return "finds no CUDA toolkit"
    nvcc, wanted = Path(CUDA_HOME) / "bin" / "nvcc", str(torch.version.cuda or "")
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"finds no nvcc that runs in CUDA_HOME {CUDA_HOME}"
    found = told.partition("release ")[2].partition(",")[0]
    if found.partition(".")[0] != wanted.partition(".")[0]:
        return f"finds CUDA {found or '?'} in {CUDA_HOME} where torch was built with {wanted or 'none'}"
    return None


def _can_be_written(folder: Path) -> bool:
    """Whether a file can be made in a folder, or the folder where it is not there yet."""
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _is_installed(name: str) -> bool:
    """Whether DeepSpeed's own installation holds it, compiled for the kind of device that there is (DS_BUILD_...)."""
    operators, device = _installed()
    return operators.get(name, False) and device == ("cuda" if torch.cuda.is_available() else "cpu")


def _installed() -> tuple[dict[str, bool], str]:
    """What DeepSpeed was installed with, and for which kind of device, as its installer wrote it down. Read and not
    imported: importing DeepSpeed takes seconds."""
    try:
        lines = (_deepspeed_folder() / "git_version_info_installed.py").read_text().splitlines()
    except OSError:
        return {}, ""
    said = {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
    return ast.literal_eval(said.get("installed_ops", "{}")), ast.literal_eval(said.get("accelerator_name", "''"))


def _deepspeed_folder() -> Path:
    package = find_spec("deepspeed")
    assert package is not None and package.submodule_search_locations is not None, "a dependency of ours"
    return Path(package.submodule_search_locations[0])


def locked_operators(names: Sequence[str]) -> list[Path]:
    """Locks of operators that some process compiles or loads, or was killed while it did."""
    locks = (operator_folder() / name / "lock" for name in names)
    return [lock for lock in locks if lock.exists()]
