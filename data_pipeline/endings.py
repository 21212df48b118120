"""What the first bytes of a file say of its content, where its name says something else."""

from pathlib import Path

BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def other_content(path: Path) -> str:
    """Why a file cannot be read as its ending says, and what to do; empty where its first bytes do not tell."""
    with path.open("rb") as file:
        first = file.read(262)
    found = next((name for beginning, name in BEGINNINGS.items() if first.startswith(beginning)), "")
    if first[257:] == b"ustar":  # a tar begins with the name of its first member, which may be any of these
        found = ""
    zipped = path.suffix.lower() in (".gz", ".tgz")
    if not first or found == {".gz": "gzip", ".tgz": "gzip", ".parquet": "parquet"}.get(path.suffix.lower(), ""):
        return ""
    if zipped and not found:
        return "the file is not compressed; take .gz off its name"
    what = {"gzip": "name it .gz", "parquet": "name it .parquet", "UTF-16": "save it as UTF-8"}.get(found, "unpack it")
    return f"the file's content is {found}, not what its ending says; {what}" if found else ""
