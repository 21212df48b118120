"""What Python code hands over as objects, as the files that a run reads: records, data sets, models.

A run must be able to go on after an interruption, and every process of it must read the same: so objects are written
once into the data cache, under a name that follows from their content.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import force_to_disk
from data_pipeline.records import Record, RecordError
from data_pipeline.sources.files import SourceOptions, open_rows
from data_pipeline.sources.formats import convert
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.nf4 import is_nf4
from diffdpo.models.load import LoadedModel, save_model

FOLDER = "handed_over"


def data_as_source(data: Any, name: str, cache_dir: Path, *, needed: int | None = None) -> str:
    """A source as the command line names it. Rows are written as JSON lines; of an endless or streamed data set the
    first ``needed``, without which it is refused."""
    if isinstance(data, (str, Path)):
        return str(data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(one, (str, Path)) for one in data):
        return ",".join(map(str, data))
    return str(_written(_rows_of(data, name, needed), cache_dir / FOLDER, name))


def _rows_of(data: Any, name: str, needed: int | None) -> Iterator[Mapping[str, Any]]:
    if isinstance(data, Mapping):
        splits = ", ".join(map(str, data))
        raise DataError(f"{name} is a mapping with {splits}; give one of its parts, such as data['train']")
    if not isinstance(data, Iterable):
        raise DataError(f"{name} is a {type(data).__name__}; give a path, a list of dicts or a datasets.Dataset")
    if not hasattr(data, "__len__"):
        if needed is None:
            how = "list(data.take(1000))" if name == "pairs" else "max_steps, or a list of records"
            raise DataError(f"{name} is a stream without an end that is known; give {how}")
        return islice(iter(data), needed)
    return iter(data)


def _written(rows: Iterable[Any], folder: Path, name: str) -> Path:
    """The rows in a file named by their content; several processes may write it at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    digest, count = hashlib.blake2b(digest_size=10), 0
    try:
        with partial.open("wb") as file:
            for count, row in enumerate(rows, start=1):
                line = _line(row, f"{name}: record {count}")
                digest.update(line)
                file.write(line)
        if not count:
            raise DataError(f"{name} holds no records")
        path = folder / f"{name}-{digest.hexdigest()}.jsonl"
        force_to_disk(partial)
        partial.rename(path)
        return path
    finally:
        partial.unlink(missing_ok=True)


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; give dicts with prompt, chosen and rejected")
    return dict(row)


def _line(row: Any, where: str) -> bytes:
    try:
        return (json.dumps(_row(row, where), ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot be written as JSON ({error}); give texts, numbers, lists and dicts") from None


def records_of(data: Any) -> Iterator[Record]:
    """The records of a path or name, or of rows, converted as by every command. DataError names the row."""
    if isinstance(data, (str, Path)):
        parsed = ((row.where, row.parsed()) for row in open_rows(str(data), SourceOptions()))
    else:
        parsed = ((f"record {n}", _row(row, f"record {n}")) for n, row in enumerate(_rows_of(data, "pairs", None), 1))
    for where, row in parsed:
        try:
            yield from convert(row)
        except RecordError as error:
            raise DataError(f"{where}: {error}") from None


def name_of(model: Any) -> str:
    """A model's name or folder as text. UserError for anything else."""
    if not isinstance(model, (str, Path)):
        raise UserError(f"a model is a name, a folder or what diffdpo.load gave, not a {type(model).__name__}")
    return str(model)


def model_as_folder(model: Any, cache_dir: Path) -> str:
    """The name of a model; a loaded one, or its adapter, is saved into the cache, as the weights it has now."""
    if not isinstance(model, LoadedModel):
        return name_of(model)
    if any(map(is_nf4, model.model.parameters())):
        raise UserError("a model in 4 bits is not handed over: name its folder, and set load_in_4bit")
    from diffdpo.reference.identity import weights_digest

    partial = cache_dir / FOLDER / f".model-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        save_model(model.model, model.tokenizer, partial)
        folder = partial.with_name(f"model-{weights_digest(str(partial))}")
        if not folder.exists():
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
        return str(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
