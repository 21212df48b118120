"""Packages that may be missing, and those that are there and cannot be used."""

import importlib
import importlib.util
import sys
from functools import cache


@cache
def fault_of(package: str) -> str | None:
    """Why a package cannot be used here; None where it can. That it is found says little: its libraries may be missing
    or of another CUDA, which only importing it tells.

    One that cannot be imported looks from here on as if it were not installed. peft asks whether bitsandbytes is there,
    and would import it for adapters on weights that have nothing to do with it.
    """
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as fault:  # whatever a library of the wrong kind raises
        sys.modules[package] = None  # type: ignore[assignment]
        return f"{package} cannot be imported: {in_a_line(fault)}"
    return None


def in_a_line(fault: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    return ": ".join([type(fault).__name__, *[line for line in str(fault).splitlines() if line.strip()][:1]])
