"""A user's name for data, parsed once: what kind of thing it stands for, and where that lies."""

from dataclasses import dataclass
from enum import Enum
from glob import escape, glob
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.addresses import check_password
from data_pipeline.errors import DataError
from data_pipeline.index import MANIFEST
from data_pipeline.remote import expand_remote, is_glob, is_remote, without_scheme
from data_pipeline.shards import TAR
from data_pipeline.sources.files import READERS, SourceOptions, named_split, suffix_of

SIDES = ("train", "eval")


class Kind(Enum):
    """What a name stands for, and what the ``places`` of its source are."""

    BUILT = "a folder made by build"  # the folder
    SPLIT = "a folder made by build with a train/eval split"  # the folder of both
    REMOTE = "a folder made by build, behind a URL"  # the URL, without a slash at its end
    SHARDS = "shards"  # each of them, paths or URLs
    ROWS = "rows, which are built first"  # files, folders, URLs, names of data sets on the hub


@dataclass(frozen=True)
class Source:
    """``name``: as the user gave it; ``places``: by kind."""

    name: str
    kind: Kind
    places: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name, made absolute: what an earlier look at the same source is found by."""
        return self.name if is_remote(self.name) else str(Path(self.name).expanduser().absolute())


def parse_source(name: str) -> Source:
    """What a name stands for. Raises DataError where it stands for nothing, or for things of two kinds."""
    name = without_scheme(name)
    if is_remote(name):
        check_password(name)
    if is_remote(name) and not name.lower().endswith(TAR):
        if Path(name).suffix and not name.endswith("/"):
            return Source(name, Kind.ROWS, tuple(expand(name)))
        return Source(name, Kind.REMOTE, (name.rstrip("/"),))
    path = Path(name).expanduser()
    if is_remote(name) or not path.is_dir():
        return _of_files(name, places := expand(name), places)
    folder = path.resolve()
    if (folder / MANIFEST).exists():
        return Source(name, Kind.BUILT, (str(folder),))
    if any((folder / side / MANIFEST).exists() for side in SIDES):
        return Source(name, Kind.SPLIT, (str(folder),))
    return _of_files(name, sorted(str(file.resolve()) for file in path.iterdir() if file.is_file()), [str(folder)])


def _of_files(name: str, files: list[str], otherwise: list[str]) -> Source:
    shards = [file for file in files if file.lower().endswith(TAR)]
    if not shards:
        return Source(name, Kind.ROWS, tuple(otherwise))
    rows = READERS.keys() - {*TAR, ".json"}  # a .json beside shards is an index, or somebody's note
    if data := [file for file in files if suffix_of(Path(file)) in rows]:
        raise DataError(f"{name} stands for shards and for other data ({data[0]}); name one of the two kinds")
    return Source(name, Kind.SHARDS, tuple(shards))


def expand(pattern: str) -> list[str]:
    """What a brace list with globs stands for: URLs and absolute paths, sorted. A plain name stands for itself."""
    path = Path(pattern).expanduser()
    if not is_remote(pattern) and path.exists():
        return [str(path.resolve())]
    folder = Path(named_split(pattern, SourceOptions())[0]).expanduser()
    if folder.exists() or not (is_glob(pattern) or "{" in pattern or pattern.lower().endswith(TAR)):
        return [pattern]
    if not is_remote(pattern):
        return sorted({path for name in _braces(path) for path in _glob(*name)})
    urls = [expand_remote(name) if is_glob(name) else [name] for name in braceexpand(pattern)]
    return sorted({url for group in urls for url in group})


def _braces(path: Path) -> list[tuple[Path, str]]:
    """(folder, pattern in it) of what a brace list stands for. A folder that is there is none, whatever its name."""
    folder = next(parent for parent in path.parents if parent.exists())
    return [(folder, name) for name in braceexpand(str(path.relative_to(folder)))]


def _glob(folder: Path, name: str) -> list[str]:
    paths = [str(Path(path).resolve()) for path in glob(str(Path(escape(str(folder))) / name))]
    if not paths:
        raise DataError(f"{folder / name} matches no file" if is_glob(name) else f"{folder / name} does not exist")
    return paths
