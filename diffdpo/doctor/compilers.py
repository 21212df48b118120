"""What compiles here, and DeepSpeed's operators: which are there, which a first run will compile, which cannot be."""

import ctypes.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from diffdpo.doctor.finding import Finding, ok, warning
from diffdpo.doctor.software import installed

USED_BY = {
    "cpu_adam": "optimizer on the host",
    "deepspeed_shm_comm": "any --ds_config without a GPU",
    "fused_adam": "optimizer on the device",
    "async_io": "NVMe offload",
    "pin_memory": "NVMe offload",
}
NVME = ("async_io", "pin_memory")


def compilers(*, gpu: bool) -> Iterator[Finding]:
    """g++ and Python.h, which DeepSpeed's operators and --torch_compile need; nvcc on a GPU."""
    for_what = "no --torch_compile, no DeepSpeed operator that is not compiled yet"
    found = next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), "")
    header = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    yield ok("C++ compiler", found) if found else warning("C++ compiler", f"none: {for_what}", "install g++")
    if not header:
        yield warning("Python.h", f"not there: {for_what}", "install python3-dev (of this Python's version)")
    if gpu:
        yield from _toolkit()


def _toolkit() -> Iterator[Finding]:
    from diffdpo.engine.operators import toolkit_fault

    if fault := toolkit_fault():
        advice = "only some runs need it (below): install the CUDA toolkit of torch's version and set CUDA_HOME"
        yield warning("CUDA toolkit", fault, advice)
        return
    from torch.utils.cpp_extension import CUDA_HOME

    yield ok("CUDA toolkit", str(CUDA_HOME))


def operators(*, gpu: bool) -> Iterator[Finding]:
    """A line for what can be had, and one for each that cannot."""
    if installed("deepspeed") is None or installed("torch") is None:
        return
    from diffdpo.engine.operator_build import usual_seconds
    from diffdpo.engine.operators import locked_operators, missing_operators
    from diffdpo.errors import UserError

    names = ["cpu_adam", "fused_adam" if gpu else "deepspeed_shm_comm"]
    there: list[str] = []
    to_compile: list[str] = []
    refused: dict[str, list[str]] = {}
    for name in (*names, *NVME):
        try:
            (to_compile if missing_operators([name]) else there).append(name)
        except UserError as fault:
            refused.setdefault(str(fault), []).append(name)
    for fault_text, those in refused.items():
        said, _, advice = fault_text.rpartition("; ")
        lost = ", ".join(f"{name} ({USED_BY[name]})" for name in those)
        yield warning("operators", f"{said}; not to be had: {lost}", advice)
    if "async_io" in to_compile and ctypes.util.find_library("aio") is None:
        to_compile.remove("async_io")
        yield warning(
            "operator async_io", "no libaio: no NVMe offload", "install libaio-dev, if NVMe offload is wanted"
        )
    yield ok("operators there", ", ".join(there) or "none")
    if to_compile:
        long = usual_seconds([name for name in to_compile if name not in NVME])
        yield ok("to be compiled", f"{', '.join(to_compile)}: once, by the first run that uses it (about {long} s)")
    for lock in locked_operators([*names, *NVME]):
        yield warning(
            "operator lock", f"{lock}: something compiles, or was killed", "a run waits for it, or removes it"
        )
