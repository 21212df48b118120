"""GPUs, and what runs on them. torch is imported in here; who asks has seen that it can be."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from subprocess import PIPE
from typing import Any

from diffdpo.doctor.finding import Finding, ok, warning

SMI_SECONDS = 8
GIB = 2**30
BUSY = 0.1  # share of a GPU's memory that others may hold before it is told
COPY_BYTES = 256 * 2**20
SLOW_LINK = 6.0  # GB/s
TRITON_NEEDS = (7, 0)  # compute capability
BROKEN = "load the driver anew or reboot (after an update its parts differ until then); what it says is in dmesg"


def visible() -> int:
    """How many GPUs torch sees here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def driver() -> Iterator[Finding]:
    """What the machine has, whatever torch sees of it; and why torch sees none of it, or not all."""
    import torch

    names, version, fault = _by_driver()
    count, asked = visible(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if fault:
        seen = f"torch sees {count} GPU{'s' if count > 1 else ''}" if count else "torch sees no GPU"
        yield warning("driver", f"nvidia-smi fails: {fault}; {seen}", BROKEN)
        return
    if not names:
        if count:
            yield ok("driver", "nvidia-smi is not there; torch sees the GPU without it")
        elif asked not in (None, "", "-1"):
            yield warning("GPU", f"none, though CUDA_VISIBLE_DEVICES is {asked!r}", "unset it, or look for the driver")
        else:
            yield ok("GPU", "none: everything runs on the CPU, for small models and data preparation")
        return
    yield ok("driver", f"{version}, {len(names)} GPU{'s' if names[1:] else ''}")
    if count:
        if count < len(names):
            yield _hidden(f"{count} of {len(names)}", asked)
        return
    if torch.version.cuda is None:
        yield warning(
            "GPU", f"{names[0]} is there, and this torch is built for the CPU", "pip install torch (for CUDA)"
        )
    elif asked is not None:
        yield warning("GPU", f"CUDA_VISIBLE_DEVICES is {asked!r} and hides {', '.join(names)}", "unset it, or give 0")
    else:
        yield warning(
            "GPU",
            f"{names[0]} is there, and torch for CUDA {torch.version.cuda} cannot use it (driver {version})",
            "update the driver; in a container add --gpus all; look at python -c 'import torch; torch.cuda.init()'",
        )


def _hidden(seen: str, asked: str | None) -> Finding:
    """Fewer GPUs than there are."""
    if asked is not None:
        return ok("GPUs seen", f"{seen}: CUDA_VISIBLE_DEVICES is {asked!r}")
    advice = "look for MIG (nvidia-smi -L; a process sees one slice), or for a card that fell out (dmesg, Xid)"
    return warning("GPUs seen", f"{seen}, and CUDA_VISIBLE_DEVICES is not set", advice)


def _by_driver() -> tuple[list[str], str, str]:
    """(GPUs, version, fault) as nvidia-smi tells them; nothing where it is not there."""
    if not shutil.which("nvidia-smi"):
        return [], "", ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.Popen(query, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
    except OSError as failure:
        return [], "", f"cannot be run ({failure.strerror})"
    try:
        out, err = process.communicate(timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what hangs inside the driver cannot be killed either
            process.communicate(timeout=1)
        return [], "", f"no answer within {SMI_SECONDS} s"
    rows = [line.rsplit(", ", 1) for line in out.splitlines() if ", " in line]
    if process.returncode == 0 and rows:
        return [name for name, _ in rows], rows[0][1], ""
    said = next((line.strip() for line in (out + "\n" + err).splitlines() if line.strip()), "it says nothing")
    return [], "", f"{said[:200]} (exit code {process.returncode})"


def each() -> Iterator[Finding]:
    """Each GPU that torch sees: memory, bf16, transfers."""
    import torch

    for index in range(visible()):
        name, properties = f"GPU {index}", torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        kind = f"sm_{properties.major}{properties.minor}"
        said = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {kind}"
        if total - free > BUSY * total:
            yield warning(name, said, "others hold memory (nvidia-smi shows who); --max_memory counts them in")
        else:
            yield ok(name, said)
        if not torch.cuda.is_bf16_supported():
            yield warning(name, "no bf16", "runs are fp32: twice the memory, and many times the time")
        yield _transfers(index)


def _transfers(index: int) -> Finding:
    """What offload lives on."""
    rates = copy_rates(index)
    said = f"{rates[0]:.1f} GB/s to it, {rates[1]:.1f} back"
    if min(rates) < SLOW_LINK:
        return warning(f"GPU {index} link", said, "PCIe 3 x8 or less: offload is slow; look at the slot (lspci -vv)")
    return ok(f"GPU {index} link", said)


def copy_rates(index: int) -> list[float]:
    """GB/s of page-locked memory to a GPU and back."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    rates = []
    for source, target in ((host, there), (there, host)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(index)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(index)
        rates.append(COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return rates


def kernels() -> Iterator[Finding]:
    """Attention without padding, FlexAttention, NCCL, triton."""
    import importlib.util

    import torch

    from diffdpo.models.architecture.layout import varlen_attn

    ampere = torch.cuda.get_device_capability() >= (8, 0)
    ways = {
        "flash (SDPA)": torch.backends.cuda.flash_sdp_enabled() and ampere,
        "varlen": varlen_attn is not None and ampere,
    }
    there, absent = ([name for name, is_there in ways.items() if is_there is wanted] for wanted in (True, False))
    advice = "rows of unequal length cost one call each; needs torch 2.11 and compute capability 8.0"
    said = f"in bf16: {', '.join(there) or 'plain'}" + (f"; not: {', '.join(absent)}" if absent else "")
    yield warning("attention", said, advice) if absent else ok("attention", said)
    asked_by = "--attn_implementation flex_attention"
    if importlib.util.find_spec("triton") is None:
        yield warning("triton", f"not there: no --torch_compile, no {asked_by}", "pip install triton")
    elif torch.cuda.get_device_capability() < TRITON_NEEDS:
        said = f"not for this GPU: no --torch_compile, no {asked_by}"
        yield warning("triton", said, "it needs compute capability 7.0; runs do without")
    else:
        yield ok("FlexAttention", f"there, for block-causal models: {asked_by}")
    nccl: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    yield ok("NCCL", ".".join(map(str, nccl)))
