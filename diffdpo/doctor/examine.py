"""All looks at the machine, in the order of the screen: what everything needs first."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffdpo.doctor import compilers, folders, gpus, host, network, software
from diffdpo.doctor.finding import ERROR, Finding, looked, worst
from diffdpo.doctor.imports import Imports

START_SECONDS = 120.0  # for the import of torch from a cold or far disk, and for CUDA to begin


def examine(
    imports: Imports, *, output_dir: Path | None = None, nvme_path: Path | None = None
) -> Iterator[tuple[str, list[Finding]]]:
    """(subject, findings) one by one, each as soon as it is known."""
    torch = looked("torch", partial(software.torch, imports), patience=START_SECONDS)
    usable = bool(torch) and worst(torch) != ERROR
    found = looked("GPU", gpus.driver, patience=START_SECONDS) if usable else []
    gpu = usable and gpus.visible() > 0
    yield (
        "software",
        [
            *looked("Python", software.python),
            *torch,
            *looked("packages", partial(software.packages, imports), patience=START_SECONDS),
            *looked("imports", partial(software.unimportable, imports), patience=START_SECONDS),
            *looked("optional packages", partial(software.optional, imports, gpu=gpu)),
        ],
    )
    if gpu:
        found += looked("GPUs", gpus.each, patience=START_SECONDS) + looked("kernels", gpus.kernels)
    yield "GPU", found
    compiled = looked("compilers", partial(compilers.compilers, gpu=gpu))
    if usable:
        compiled += looked("operators", partial(_operators, imports, gpu=gpu))
    yield "compiled code", compiled
    memory = (host.memory, host.allocator, host.locked_memory, host.shared_memory)
    about_host = (*memory, host.processors, network.interfaces)
    yield "host", [finding for look in about_host for finding in looked(look.__name__.replace("_", " "), look)]
    disks = (
        *looked("outputs", partial(folders.outputs, output_dir)),
        *looked("NVMe offload", partial(folders.nvme, nvme_path)),
        *looked("caches", folders.caches),
    )
    yield "disks", list(disks)


def _operators(imports: Imports, *, gpu: bool) -> Iterator[Finding]:
    if not imports.fault("deepspeed"):  # which is an answer already
        yield from compilers.operators(gpu=gpu)
