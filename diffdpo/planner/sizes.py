"""Sizes of memory, and rates, as users write and read them."""

import re

from diffdpo.errors import UserError

GIB = 2**30
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def parse_size(text: str, flag: str) -> int:
    """``16GiB``, ``16G``, ``24.5 GB``, ``1TB`` → bytes. UserError for anything else and for sizes below 1 MiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS:
        raise UserError(f"--{flag} {text!r} is no size; write it like 16GiB or 64GB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if not size:
        raise UserError(f"--{flag} {text} is nothing; write it like 16GiB or 64GB")
    if size < 2**20:
        raise UserError(f"--{flag} {text} is {size} bytes; write the unit, like {match[1]}GiB")
    return size


def parse_rate(text: str, flag: str) -> float:
    """``97.5T``, ``717G`` → 97.5e12, 717e9, of FLOP/s or bytes/s. UserError for anything else and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GT])\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--{flag} {text!r} is no rate; write it like 97.5T or 717G, in 1/s")
    return float(match[1]) * {"G": 1e9, "T": 1e12}[match[2].upper()]


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
