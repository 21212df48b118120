"""The YAML of a sweep: which settings are tried, and the flags of each cell. No torch in here.

name: beta                     # default: the file's name
command: train                 # or sft
fixed:                         # flags of every cell, by name
  config: recipes/dpo_gsm8k.yaml
  max_steps: 200
grid:                          # every combination
  beta: [0.05, 0.1]
  seed: [0, 1, 2]
list:                          # each of these instead, or with every combination of the grid
  - {loss_type: ipo}
  - {loss_type: sigmoid, learning_rate: 3e-4}
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffdpo.errors import UserError

KEYS = ("name", "command", "fixed", "grid", "list")
COMMANDS = ("train", "sft")
OWN = ("output_dir", "run_name", "resume_from_checkpoint", "tracking_uri", "run_tags")
"""Settings that the sweep gives to each cell."""
LONGEST_NAME = 100


@dataclass(frozen=True)
class Cell:
    """A run of the sweep: its name, which is that of its folder, and its flags by name."""

    name: str
    flags: Mapping[str, Any]

    def words(self) -> list[str]:
        """The flags as words of a command line."""
        return [word for name, value in self.flags.items() for word in (f"--{name}", *_words(value))]


@dataclass(frozen=True)
class Grid:
    """A sweep as its file says."""

    name: str
    command: str
    cells: tuple[Cell, ...]
    experiment: str
    tracking_uri: str | None


def read_grid(path: Path) -> Grid:
    """The cells of a file. UserError for what is no sweep; the flags are for their command to check."""
    content = _content(path)
    command = str(content.get("command", "train"))
    if command not in COMMANDS:
        raise UserError(f"{path}: command is {command!r}; allowed: {', '.join(COMMANDS)}")
    name = str(content.get("name", path.stem))
    if not re.fullmatch(r"[\w .=-]+", name) or name.startswith("."):
        raise UserError(f"{path}: name is {name!r}; letters, digits, blanks and _ . = - make a folder's name")
    fixed = _mapping(path, "fixed", content.get("fixed"))
    tracking_uri = fixed.pop("tracking_uri", None)
    cells = [_cell(path, fixed, tried) for tried in _tried(path, content)]
    names = [cell.name for cell in cells]
    if twins := sorted({one for one in names if names.count(one) > 1}):
        raise UserError(f"{path}: {twins[0]} stands in it twice")
    return Grid(name, command, tuple(cells), str(fixed.get("experiment_name", "diffdpo")), tracking_uri)


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no sweep; write 'grid:' and below it lines such as 'beta: [0.05, 0.1]'")
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise UserError(
            f"{path}: {unknown[0]} is no part of a sweep; allowed: {', '.join(KEYS)} (flags go below fixed)"
        )
    if not content.get("grid") and not content.get("list"):
        raise UserError(f"{path} tries nothing: it has neither grid nor list")
    return content


def _tried(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the cells differ by: every entry of the list with every combination of the grid."""
    axes = {}
    for name, values in _mapping(path, "grid", content.get("grid")).items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise UserError(f"{path}: grid: {name} is {values!r}; give a list of values, such as [{values}]")
        axes[name] = values
    entries = content.get("list") or [{}]
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise UserError(f"{path}: list is {entries!r}; give entries such as '- {{loss_type: ipo, beta: 0.1}}'")
    listed = [_mapping(path, f"list, entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for entry in listed:
        if both := [name for name in entry if name in axes]:
            raise UserError(f"{path}: {both[0]} stands in the list and in the grid; take it out of one")
    return [{**entry, **combination} for entry in listed for combination in combinations]


def _mapping(path: Path, where: str, content: Any) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: {where} is {content!r}; write flags by name, such as 'beta: 0.1'")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in content.items()}


def _cell(path: Path, fixed: Mapping[str, Any], tried: Mapping[str, Any]) -> Cell:
    flags = {**fixed, **tried}
    for name in OWN:
        if name in flags:
            raise UserError(f"{path}: {name} is given to each cell by the sweep; take it out")
    return Cell(_name(tried), {name: value for name, value in flags.items() if value is not None})


def _name(tried: Mapping[str, Any]) -> str:
    """``beta=0.1 seed=0``; what no folder's name can hold is replaced, and what is long ends in a digest."""
    words = [f"{name}={','.join(_words(value))}" for name, value in tried.items()]
    plain = re.sub(r"[^\w .,=+-]+", "-", " ".join(words)).strip(" .-") or "cell"
    if len(plain) <= LONGEST_NAME and plain == " ".join(words):
        return plain
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=4).hexdigest()
    return f"{plain[:LONGEST_NAME]}-{digest}"


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [word for part in value for word in _words(part)]
    return [str(value)]
