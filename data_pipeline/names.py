"""Several sources in one text, as a flag or a recipe names them."""

import re
from pathlib import Path

OUTSIDE_BRACES = re.compile(r",(?![^{}]*\})")


def source_names(text: str) -> list[str]:
    """The sources of a list with commas; those in braces are a pattern's. What exists under the whole name is one."""
    if Path(text).expanduser().exists():
        return [text]
    return [name.strip() for name in OUTSIDE_BRACES.split(text)]
