"""Reading rows: .jsonl(.gz), .json, .csv/.tsv, .parquet, saved ``datasets`` folders and names of data sets on the hub.

Rows stream: nothing but a .json file and a data set on the hub is held in memory. JSON lines are handed out unparsed,
so that parsing happens in the workers of a build.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, cast

from data_pipeline.addresses import hidden
from data_pipeline.endings import other_content
from data_pipeline.errors import DataError
from data_pipeline.hub import in_a_line
from data_pipeline.members import Bad, read_members
from data_pipeline.records import LABELS, RecordError, parse_json, without_repetition
from data_pipeline.remote import cached_file, is_remote
from data_pipeline.shards import TAR, unpack_gzip
from data_pipeline.sources.columns import ANSWERS, ASKED, LISTS, PAIR, TEXTS, TURNS
from data_pipeline.sources.folders import folder_splits
from data_pipeline.sources.hub import hub_items
from data_pipeline.telling import warn_once

csv.field_size_limit(1 << 27)
TORN = (EOFError, gzip.BadGzipFile, zlib.error)  # what reading a cut or damaged .gz raises
ANSWERED = (*PAIR, *ANSWERS, *TEXTS, *LISTS)
LEFT_OUT = ("foreign_member",)  # of a tar: no record, and no damage
DEFAULT_SPLIT = "train"  # of a data set by name and of a saved one
NO_DATA = ("", ".md", ".py", ".sh", ".yaml", ".yml", ".toml", ".lock", ".ipynb", ".html", ".pdf", ".png", ".jpg")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of data, not data


class Row(NamedTuple):
    """One row and where it stands, ``file:line``. ``data`` is a dict, bytes of JSON not parsed yet, or why there is no
    row where one could be."""

    where: str
    data: dict | bytes | RecordError

    def parsed(self) -> dict:
        """The row as a dict. Raises RecordError."""
        if isinstance(self.data, RecordError):
            raise self.data
        return parse_json(self.data) if isinstance(self.data, bytes) else self.data


@dataclass(frozen=True)
class SourceOptions:
    """How a source is found: its split (None: not named) and configuration, and where remote files are cached."""

    split: str | None = None
    config: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class RowSource:
    """What rows are read from: a file that lies here (fetched if it is remote), a folder, or a data set on the hub (no
    ``path``), with the split and configuration that were named."""

    name: str
    path: Path | None
    options: SourceOptions


def open_rows(name: str, options: SourceOptions) -> Iterator[Row]:
    """The rows of a file, a saved ``datasets`` folder or a hub name, in order. Raises DataError."""
    return read_rows(row_source(name, options))


def row_source(name: str, options: SourceOptions) -> RowSource:
    """What a name stands for; what is remote is fetched. Raises DataError."""
    path = _local_path(name, options)
    name, options = named_split(name, options)
    return RowSource(name, path, options)


def read_rows(source: RowSource) -> Iterator[Row]:
    """The rows of a source that is no folder of files, in order. Raises DataError."""
    path = source.path
    if path is None:
        return _hub_rows(source.name, source.options)
    if path.is_dir():
        return _saved_dataset_rows(path, source.options)
    return _reader_of(path)(path, hidden(source.name) if is_remote(source.name) else path.name)


def parts_of_folder(source: RowSource) -> list[RowSource]:
    """The data files of a folder (of its split, if it has several), each a source of its own; any other source stands
    for itself. DataError where a split is named and there is none to choose, or none is named and there are several."""
    path, options = source.path, source.options
    if path is not None and path.is_file():
        refuse_split(source.name, options)
    if path is None or not path.is_dir() or is_saved_dataset(path):
        return [source]
    if all((path / side / "manifest.json").exists() for side in ("train", "eval")):
        raise DataError(
            f"{path} holds a train/eval split, which a build would mix; name {path}/train, {path}/eval or both"
        )
    files = [str(p) for p in source_files(path) if suffix_of(p) in READERS]
    if not files:
        raise DataError(f"{path}: the folder has no data file; allowed: {', '.join(sorted(READERS))}, or shards (.tar)")
    _tell_what_is_not_read(path)
    if shards := [name for name in files if name.lower().endswith(TAR)]:  # beside shards lies their index
        refuse_split(source.name, options)
        files = shards
    else:
        files = _files_of_split(path, files, options)
    return [RowSource(file, Path(file), SourceOptions(cache_dir=options.cache_dir)) for file in files]


def _tell_what_is_not_read(folder: Path) -> None:
    """Tell of the files in a folder whose ending nobody reads, but for what goes with data and is none."""
    other = [p for p in source_files(folder) if suffix_of(p) not in READERS and p.suffix.lower() not in NO_DATA]
    if other:
        names = ", ".join(str(p.relative_to(folder)) for p in other[:5]) + (", ..." if len(other) > 5 else "")
        warn_once(f"{folder}: {len(other)} files are not read for their ending: {names}")


def is_saved_dataset(folder: Path) -> bool:
    """Whether the library ``datasets`` saved this folder. Other programs write a ``dataset_info.json`` too."""
    if (folder / "dataset_dict.json").exists():
        return True
    return (folder / "dataset_info.json").exists() and (folder / "state.json").exists()


def _files_of_split(folder: Path, files: list[str], options: SourceOptions) -> list[str]:
    splits = folder_splits(folder, options.config)
    if options.split is None and len(splits) > 1:
        raise DataError(f"{folder} holds several splits ({', '.join(splits)}); name one: {folder}:{next(iter(splits))}")
    if options.split is None and options.config is None:
        (split, listed), *_ = splits.items()
        if others := {Path(file).resolve() for file in files} - {file.resolve() for file in listed}:
            raise DataError(
                f"{folder} holds the split {split} and, besides, files of no split ({min(others).name}); name "
                f"{folder}:{split}, or the files"
            )
        return files
    if options.split is not None and options.split not in splits:
        raise DataError(f"{folder} has no split {options.split!r}; allowed: {', '.join(splits)}")
    split = options.split or next(iter(splits))
    chosen = {file.resolve() for file in splits[split]}  # ``datasets`` makes paths absolute, and follows links
    names = [name for name in files if Path(name).resolve() in chosen]
    if not names:
        raise DataError(f"{folder}: split {split!r} has no data file; allowed: {', '.join(sorted(READERS))}")
    return names


def refuse_split(source: str, options: SourceOptions) -> None:
    """DataError when a split or a configuration was named of a source that has none."""
    for name in ("split", "config"):
        if (value := getattr(options, name)) is not None:
            raise DataError(f"{source}: there is no {name} {value!r} to choose in files and shards; leave it out")


def named_split(source: str, options: SourceOptions) -> tuple[str, SourceOptions]:
    """``name:split`` of a hub data set or a folder → the name, and the options with that split."""
    name, colon, split = source.rpartition(":")
    if not colon or is_remote(source) or "/" in split or Path(source).expanduser().exists():
        return source, options
    return name, replace(options, split=split)


def _local_path(source: str, options: SourceOptions) -> Path | None:
    """Where the source lies here (fetched if it is remote); None for the name of a data set on the hub."""
    if not source.strip():
        raise DataError("no data source is named; give a file, a folder, a URL or the name of a data set on the hub")
    if is_remote(source):
        if not Path(source).suffix:
            raise DataError(f"{source} is no file; to build from a folder behind a URL, name its files or shards")
        return cached_file(source, options.cache_dir)
    path = Path(named_split(source, options)[0]).expanduser()
    if path.exists():
        return path
    if suffix_of(path) in READERS or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise DataError(f"{source!r} does not exist; give a file, a folder, a URL or the name of a data set on the hub")
    return None


def source_files(path: Path) -> list[Path]:
    """The data files of a folder, sorted; a file stands for itself."""
    if not path.is_dir():
        return [path]
    described = () if is_saved_dataset(path) else DESCRIPTIONS
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.name not in described)


def suffix_of(path: Path) -> str:
    """The ending that tells how a file is read: the last one, with the one before ``.gz``."""
    return "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _reader_of(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{path}: files ending in {suffix_of(path)!r} are not read; allowed: {', '.join(sorted(READERS))}"
        )
    if fault := other_content(path):
        raise DataError(f"{path}: {fault}")
    return reader


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _json_line_rows(path: Path, name: str) -> Iterator[Row]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(f"{name}:{number}", line)
    except TORN as error:
        raise _torn(f"{name}: after line {number}", error) from error


def _torn(where: str, error: Exception) -> RecordError:
    return RecordError("torn_file", f"{where}: {error}: the file is cut or damaged", malformed=True)


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    """A list of objects, an object whose one list is the data, or JSON lines under the wrong name."""
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=without_repetition)
    except RecordError as error:
        raise DataError(f"{name}: {error}") from error
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            yield from _json_line_rows(path, name)
            return
        raise DataError(f"{name}: invalid JSON: {error}") from error
    data = _listed(data, name) if isinstance(data, dict) else data
    if not isinstance(data, list):
        raise DataError(f"{name}: a list of objects is needed, found {type(data).__name__}")
    for number, item in enumerate(data, 1):
        yield Row(f"{name}, item {number}", _object(item, f"{name}, item {number}"))


def _listed(data: dict, name: str) -> list:
    """The rows of an object: its one list, or the object itself. DataError for a table in another order."""
    row = bool(data.keys() & {*PAIR, *ASKED, *TURNS})
    lists = [value for value in data.values() if isinstance(value, list)]
    if data and all(isinstance(value, dict) and (not row or all(map(str.isdigit, value))) for value in data.values()):
        raise DataError(
            f"{name}: an object of objects, as pandas writes a table; write a list of rows (to_json with "
            "orient='records')"
        )
    if not row and len(lists) > 1 and all(isinstance(item, dict) for value in lists for item in value):
        raise DataError(f"{name}: an object of {len(lists)} lists ({', '.join(data)}); give each a file of its own")
    return lists[0] if len(lists) == 1 and not row else [data]


def _object(item: Any, where: str) -> dict:
    if not isinstance(item, dict):
        raise DataError(f"{where}: an object is needed, found {type(item).__name__}")
    return item


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    """Cells are text; lists in them are read where rows are (``columns.Fields``). An empty cell is absent, but for the
    text that the row lacks: an empty prompt or answer."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        _refuse_repeated(_header(reader, name), name)
        for cells in _csv_cells(reader, name):
            where = f"{name}:{reader.line_num}"
            if None in cells:
                raise DataError(f"{where}: more cells than the header has columns ({len(reader.fieldnames or [])})")
            row = {column: value or None for column, value in cells.items() if value or column in LABELS}
            yield Row(where, row | dict.fromkeys(_empty_texts(cells), ""))


def _header(reader: csv.DictReader, name: str) -> list[str]:
    try:
        return [column for column in reader.fieldnames or [] if column]
    except TORN as error:
        raise _torn(f"{name}: the header", error) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: the header: {error}; save the table as UTF-8") from error


def _refuse_repeated(columns: Sequence[str], name: str) -> None:
    """DataError for a column that stands twice in a table, of which the last would be read in silence."""
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise DataError(f"{name}: the column {twice!r} stands twice in the table; take one out")


def _csv_cells(reader: csv.DictReader, name: str) -> Iterator[dict]:
    try:
        yield from reader
    except TORN as error:
        raise _torn(f"{name}: after line {reader.line_num}", error) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: after line {reader.line_num}: {error}; save the table as UTF-8") from error


def _empty_texts(cells: dict[str, str]) -> list[str]:
    """The empty cells that are missing text: prompts and answers where no other one makes up for them."""
    paired, asked, answered = (any(cells.get(name) for name in names) for names in (PAIR, ASKED, ANSWERED))
    prompts = () if asked or paired else ASKED  # a pair may hold its prompt itself
    answers = PAIR if paired else () if answered else ANSWERED
    return [name for name in (*prompts, *answers) if cells.get(name) == ""]  # None: the line ends before it


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: not a readable parquet file: {error}") from error
    number = 0
    _refuse_repeated(file.schema_arrow.names, name)
    classes = _classes_of_parquet(file.schema_arrow)
    with file:
        for batch in file.iter_batches(batch_size=1024):
            for item in batch.to_pylist():
                number += 1
                yield Row(f"{name}, row {number}", item | _class_names(item, classes))


def _tar_gz_rows(path: Path, name: str) -> Iterator[Row]:
    """The records of a compressed shard, unpacked for the while."""
    with TemporaryDirectory(prefix="diffdpo-") as folder:
        plain = Path(folder) / "shard.tar"
        fault = unpack_gzip(path, plain)
        yield from _tar_rows(plain, name, fault)


def _tar_rows(path: Path, name: str, fault: str = "") -> Iterator[Row]:
    """The records of a shard, and what else stands in it; damage of the whole is raised behind the last of them."""
    damage = [Bad("damaged_gzip", "", fault)] if fault else []
    seen: set[str] = set()
    for item in read_members(path):
        where = f"{name}, key {item.key}"
        if isinstance(item, Bad) and not item.key:
            damage.append(item)
        elif isinstance(item, Bad):
            yield Row(where, RecordError(item.kind, item.detail, malformed=item.kind not in LEFT_OUT))
        elif item.key in seen:
            yield Row(where, RecordError("duplicate_key", "the key stands in the shard twice; the first counts"))
        else:
            seen.add(item.key)
            yield Row(where, item.raw)
    if damage:
        first = f"{damage[0].kind}: {damage[0].detail}"
        raise RecordError("damaged_shard", f"{name}: {len(damage)} faults, first {first}", malformed=True)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_line_rows,
    ".jsonl.gz": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".tar": _tar_rows,
    ".tar.gz": _tar_gz_rows,
    ".tgz": _tar_gz_rows,
}


def _saved_dataset_rows(path: Path, options: SourceOptions) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, by what is missing or damaged
        raise DataError(f"{path} is no saved data set that can be read: {in_a_line(error)}") from error
    splits = data if isinstance(data, datasets.DatasetDict) else {str(data.split or "train"): data}
    split = options.split or (DEFAULT_SPLIT if isinstance(data, datasets.DatasetDict) else next(iter(splits)))
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; allowed: {', '.join(splits)}")
    data = splits[split]
    yield from _rows_of(data, data.features, path.name)


def _hub_rows(source: str, options: SourceOptions) -> Iterator[Row]:
    split = options.split or DEFAULT_SPLIT
    items = hub_items(source, options.config, split)
    yield from _rows_of(items, getattr(items, "features", None), f"{source}[{split}]")


def _rows_of(items: Iterable[dict], features: Any, name: str) -> Iterator[Row]:
    """The rows of a data set; a class is what its name says, whatever its number."""
    classes = {column: kind.names for column, kind in (features or {}).items() if hasattr(kind, "names")}
    for number, item in enumerate(items, 1):
        yield Row(f"{name}, row {number}", item | _class_names(item, classes))


def _class_names(item: dict, classes: dict[str, list[str]]) -> dict[str, str | None]:
    """What the numbers of classes stand for; a negative one, and none, for nothing."""
    numbers = {column: item[column] for column in classes}
    return {column: None if n is None or n < 0 else classes[column][n] for column, n in numbers.items()}


def _classes_of_parquet(schema: Any) -> dict[str, list[str]]:
    """{column: names of its classes}, as the library ``datasets`` notes them in a file; empty in other files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
