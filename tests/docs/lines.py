"""The command lines of the pages, and how each is made one that runs here in a moment."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.paths import ROOT

PROGRAMS = ("diffdpo", "python", "python3", "torchrun", "deepspeed", "accelerate", "sbatch", "mlflow", "pip", "docker")
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Line:
    """A command as a page has it, without its comment; continued lines are one."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return [word for word in shlex.split(self.text, comments=True) if word not in ("[flags]", "...")]


def all_lines() -> list[Line]:
    """Of the pages (the log of what was tried aside), and of the recipes' headers; each text once a page."""
    found = []
    for path in [*(page for page in PAGES if page.name != "LOG.md"), *RECIPES]:
        text = path.read_text()
        if path.suffix == ".yaml":
            text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#   "))
        found += [Line(str(path.relative_to(ROOT)), command) for command in _commands(text)]
    return list(dict.fromkeys(found))


def _commands(text: str) -> Iterator[str]:
    """Lines of bash blocks, and indented ones that begin with a program."""
    fence, going_on = None, ""
    for line in text.splitlines():
        if mark := re.match(r"\s*```(\w*)", line):
            fence = mark[1] if fence is None else None
            continue
        word = line.split()[0] if line.split() else ""
        indented = fence is None and line.startswith("  ") and (word in PROGRAMS or ("=" in word and word.isupper()))
        if not (going_on or fence == "bash" or indented) or not word:
            continue
        whole = f"{going_on} {line.strip()}".strip()
        if whole.endswith("\\"):
            going_on = whole[:-1].strip()
        else:
            going_on = ""
            yield whole


def in_place(words: list[str], stand_ins: dict[str, str]) -> list[str]:
    """Words as they can be run in any folder: files of the project at their place, what a user has by stand-ins."""
    found = []
    for word in words:
        word = stand_ins.get(word, word)
        here = ROOT / word
        found.append(str(here) if re.match(r"(launch|recipes|ds_configs|docs)/", word) and here.exists() else word)
    return found
