"""The tree of docs/architecture.md: a line a module, from its docstring. `python -m tests.support.tree` writes it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs/architecture.md"
TOPS = ("launch", "diffdpo", "data_pipeline", "benchmarks")
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"
COLUMN = 27


def first_sentence(path: Path) -> str:
    """What a module says it is: the first line of its docstring, to the first full stop or colon that ends it."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[:1]
    return re.split(r"\.(?: |$)", line[0])[0].rstrip(".") if line else ""


def lines_of(folder: Path, indent: int) -> Iterator[str]:
    """A folder's files, then its folders."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            name = " " * indent + path.name
            yield f"{name:<{COLUMN}} {first_sentence(path)}"
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))):
        yield " " * indent + below.name + "/"
        yield from lines_of(below, indent + 2)


def tree() -> str:
    """All of it, as it stands in the document."""
    lines = [line for top in TOPS for line in (f"{top}/", *lines_of(ROOT / top, 2))]
    return "\n".join([BEGIN, "```text", *lines, "```", END])


def document() -> str:
    """The document with the tree as it is now."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: tree(), DOCUMENT.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
