"""A file, folder or data set that is read once from beginning to end, without shards: its records or questions."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TypeVar

from data_pipeline.errors import DataError
from data_pipeline.records import Record, RecordError
from data_pipeline.sources.choices import ChoiceRecord, choice_records
from data_pipeline.sources.files import SourceOptions, open_rows
from data_pipeline.sources.formats import convert

Made = TypeVar("Made")


def records_in(source: str, *, flag: str) -> Iterator[Record]:
    """The records of ``source``, the first one checked now. DataError names the ``flag`` and the place of a row that
    cannot be used, and tells of a source without any."""
    return _read(source, convert, flag)


def questions_in(source: str, *, flag: str) -> Iterator[ChoiceRecord]:
    """The multiple-choice questions of a source, read once."""
    return _read(source, choice_records, flag)


def _read(source: str, make: Callable[[dict], Iterable[Made]], flag: str) -> Iterator[Made]:
    def made() -> Iterator[Made]:
        for row in open_rows(source, SourceOptions()):
            try:
                yield from make(row.parsed())
            except RecordError as error:
                raise DataError(f"{flag} {row.where}: {error}") from None

    found = made()
    first = next(found, None)
    if first is None:
        raise DataError(f"{flag} {source}: no records in it")
    return chain([first], found)
