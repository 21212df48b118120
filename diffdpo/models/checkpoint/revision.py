"""A model of the hub at a branch, tag or commit, by one name: NAME@REVISION. Names of the hub have no @. No torch."""

from pathlib import Path


def pinned(name: str | None, revision: str | None) -> str | None:
    """One name for both."""
    return f"{name}@{revision}" if name and revision else name


def split_revision(name_or_path: str) -> tuple[str, str | None]:
    """(name, revision); None for a folder, whatever its name, and where none is named."""
    name, at, revision = name_or_path.rpartition("@")
    if not at or not name or not revision or Path(name_or_path).exists():
        return name_or_path, None
    return name, revision
