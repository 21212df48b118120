"""Python, the packages that a run needs, and those that only some runs need. No torch in here, unless it is there."""

import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from diffdpo.doctor.finding import Finding, error, ok, warning
from diffdpo.doctor.imports import Imports, module_of

OLDEST_PYTHON = (3, 11)
FOR_DEEPSPEED = ("deepspeed", "ninja")
OPTIONAL = {
    "bitsandbytes": ("--load_in_4bit", "pip install bitsandbytes"),
    "liger-kernel": ("--use_liger_kernel", "pip install liger-kernel"),
}
"""Package → the flag that needs it, and what to do."""
FIRST = ("numpy", "torch", "psutil", "transformers", *OPTIONAL)
"""Packages that others import: asked for before them, so that a fault is told by the name of the one that has it."""


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield error("Python", version, f"diffdpo needs {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    else:
        yield ok("Python", f"{version} in {sys.prefix}")


def begin_imports() -> Imports:
    """The imports of all that is installed of what runs need."""
    known = [*FIRST, *(name for name, _ in requirements() if name not in FIRST)]
    return Imports([name for name in known if installed(name) is not None])


def packages(imports: Imports) -> Iterator[Finding]:
    """What pyproject.toml asks for: a line for all that is as it should be, and one for each that is not."""
    fitting = 0
    for name, wanted in requirements():
        version = installed(name)
        asked = f"{name}{wanted}"
        if version is None:
            yield _missing(name, asked)
        elif not _satisfies(version, wanted):
            yield warning(name, f"{version}, asked for: {asked}", f"pip install '{asked}'")
        elif not imports.fault(name):
            fitting += 1
    shown = ("transformers", "deepspeed", "peft", "mlflow")
    versions = ", ".join(f"{name} {version}" for name in shown if (version := installed(name)))
    yield ok("packages", f"{fitting} as asked for ({versions})" if versions else f"{fitting} as asked for")


def _missing(name: str, asked: str) -> Finding:
    advice = f"pip install '{asked}'"
    if name in FOR_DEEPSPEED:
        return warning(name, "not installed: no run with --ds_config", f"{advice}; without it: --engine plain or fsdp2")
    return error(name, "not installed", advice)


def unimportable(imports: Imports) -> Iterator[Finding]:
    """What is installed and cannot be imported: a line for each fault, by the first of the packages that have it."""
    by_fault: dict[str, list[str]] = {}
    for name in (*FIRST, *(name for name, _ in requirements() if name not in FIRST)):
        if fault := imports.fault(name):
            by_fault.setdefault(fault, []).append(name)
    for fault, (name, *others) in by_fault.items():
        said = f"cannot be imported ({fault})" + (f", nor can {', '.join(others)}" if others else "")
        needed = not {name, *others} <= {*FOR_DEEPSPEED, *OPTIONAL}
        if not needed:
            said += f": no {', '.join(sorted({_lost(each) for each in (name, *others)}))}"
        yield (error if needed else warning)(name, said, _anew(name))


def _lost(name: str) -> str:
    return OPTIONAL[name][0] if name in OPTIONAL else "run with --ds_config"


def _anew(name: str) -> str:
    """What to do about an installed package that cannot be imported."""
    spec = importlib.util.find_spec(module_of(name))
    return f"install it anew: pip install --force-reinstall {name}" + (
        f"; it is read from {spec.origin}" if spec and spec.origin else ""
    )


def optional(imports: Imports, *, gpu: bool) -> Iterator[Finding]:
    """What a flag needs that most runs do without. ``gpu``: whether there is one."""
    for name, (flag, advice) in OPTIONAL.items():
        version = installed(name)
        if version and imports.fault(name):
            continue  # `unimportable` says so
        if version:
            yield ok(name, version if gpu or name == "bitsandbytes" else f"{version} (used on a GPU only)")
        elif gpu:
            yield warning(name, f"not installed: no {flag}", advice)
        else:
            yield ok(name, f"not installed: no {flag}")


def torch(imports: Imports) -> Iterator[Finding]:
    """What it is built for, where it can be imported."""
    if installed("torch") is None or imports.fault("torch"):
        return  # `packages` or `unimportable` says so
    found = importlib.import_module("torch")
    built = found.version.cuda
    yield ok("torch", f"{found.__version__}, {f'built for CUDA {built}' if built else 'built for the CPU alone'}")


def requirements() -> list[tuple[str, str]]:
    """(package, versions asked for) of this project, from its checkout or its installation."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("diffdpo") or () if "extra ==" not in line]
    found = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", line) for line in lines)
    return [(match[1], match[2].strip(" ()")) for match in found if match]


def installed(name: str) -> str | None:
    """Its version; None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # it comes with torch's and transformers' dependencies; without them other lines say more
        return True
    return not wanted or SpecifierSet(wanted).contains(version, prereleases=True)
