"""The DeepSpeed files and recipes that come with diffdpo, found by name from any folder. No torch in here."""

import difflib
from pathlib import Path

from diffdpo.errors import UserError

SUFFIXES = {"ds_configs": (".json",), "recipes": (".yaml", ".yml")}


def shipped_folder(kind: str) -> Path:
    """``ds_configs`` or ``recipes``: that of the checkout, else the copy in the installed package."""
    package = Path(__file__).parent
    beside = package.parent / kind
    return beside if beside.is_dir() else package / kind


def shipped_names(kind: str) -> list[str]:
    """What comes with diffdpo, by the names that flags take."""
    return sorted(path.stem for path in shipped_folder(kind).glob("*") if path.suffix in SUFFIXES[kind])


def find_shipped(kind: str, name: str, *, flag: str) -> Path:
    """The file that ``flag`` names: a path that exists, else the shipped one of that name (with or without suffix and
    the folder's name). UserError where it is neither, with the names that there are."""
    path = Path(name)
    if path.exists():
        return path
    folder, plain = shipped_folder(kind), path.parent in (Path("."), Path(kind))
    if plain and path.stem in shipped_names(kind):
        found = next(
            folder / (path.stem + suffix) for suffix in SUFFIXES[kind] if (folder / (path.stem + suffix)).exists()
        )
        if path.suffix in ("", found.suffix):
            return found
    near = difflib.get_close_matches(path.stem, shipped_names(kind), n=1)
    meant = f"; {near[0]} is meant?" if near and plain else ""
    raise UserError(f"{flag} {name}: no such file{meant} (shipped: {', '.join(shipped_names(kind))})")
