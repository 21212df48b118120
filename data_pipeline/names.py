"""Several sources in one text, as a flag or a recipe names them."""

import re
from pathlib import Path

from data_pipeline.errors import DataError

OUTSIDE_BRACES = re.compile(r",(?![^{}]*\})")


def source_names(text: str) -> list[str]:
    """The sources of a list with commas; those in braces are a pattern's. What exists under the whole name is one.
    DataError where nothing stands before or behind a comma."""
    if Path(text).expanduser().exists():
        return [text]
    names = [name.strip() for name in OUTSIDE_BRACES.split(text)]
    if not all(names):
        raise DataError(f"{text!r} has a comma without a source on one side; take it away, or name the source")
    return names
