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
optuna:                        # in place of grid and list: cells that Optuna proposes
  trials: 20
  metric: rewards/accuracies   # held out, at the end; the default
  space: {beta: {low: 0.02, high: 0.5, log: true}, loss_type: [sigmoid, ipo]}
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffdpo.errors import UserError
from diffdpo.settings.yaml_text import by_flag_name, read_once

KEYS = ("name", "command", "fixed", "grid", "list", "optuna")
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
        return [word for name, value in self.flags.items() for word in (f"--{name}", *words_of(value))]


@dataclass(frozen=True)
class Search:
    """What Optuna is to try: ``space`` has a list of values or {low, high, step or log} a flag."""

    trials: int
    metric: str
    space: Mapping[str, Any]
    seed: int

    def corners(self) -> list[dict[str, Any]]:
        """Values at the ends of the space, each of every flag at least once."""
        ends = {name: of if isinstance(of, list) else [of["low"], of["high"]] for name, of in self.space.items()}
        most = max(map(len, ends.values()))
        return [{name: values[min(place, len(values) - 1)] for name, values in ends.items()} for place in range(most)]

    def choices(self) -> list[dict[str, Any]]:
        """Each value of each list, the other flags as in the first corner."""
        first = self.corners()[0]
        return [{**first, name: value} for name, of in self.space.items() if isinstance(of, list) for value in of]


@dataclass(frozen=True)
class Grid:
    """A sweep as its file says; with ``search`` its cells are not known before they are proposed."""

    name: str
    command: str
    cells: tuple[Cell, ...]
    experiment: str
    tracking_uri: str | None
    search: Search | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


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
    search = _search(path, content)
    tried = [] if search else _tried(path, content)
    if unused := [name for name in fixed if all(name in one for one in ([search.space] if search else tried))]:
        raise UserError(f"{path}: {unused[0]} stands in fixed, and each cell tries another value; take one out")
    cells = [_cell(path, fixed, one) for one in tried]
    names = [cell.name for cell in cells]
    if twins := sorted({one for one in names if names.count(one) > 1}):
        raise UserError(f"{path}: {twins[0]} stands in it twice")
    experiment = str(fixed.get("experiment_name", "diffdpo"))
    return Grid(name, command, tuple(cells), experiment, tracking_uri, search, fixed)


def cell_of(grid: Grid, tried: Mapping[str, Any]) -> Cell:
    """The cell of a sweep that tries these values."""
    return _cell(Path(grid.name), grid.fixed, tried)


def _search(path: Path, content: Mapping[str, Any]) -> Search | None:
    """The part ``optuna``. UserError for what cannot be tried."""
    given = _mapping(path, "optuna", content.get("optuna"))
    if not given:
        return None
    if content.get("grid") or content.get("list"):
        raise UserError(f"{path}: optuna proposes all cells; take grid and list out, or optuna")
    trials, space = given.pop("trials", None), _mapping(path, "optuna: space", given.pop("space", None))
    search = Search(trials, str(given.pop("metric", "rewards/accuracies")), space, given.pop("seed", 0))  # type: ignore[arg-type]
    if given:
        raise UserError(f"{path}: optuna: {next(iter(given))} is unknown; allowed: trials, metric, seed, space")
    for name, value in (("trials", search.trials), ("seed", search.seed)):
        if not isinstance(value, int) or isinstance(value, bool) or value < (name == "trials"):
            raise UserError(f"{path}: optuna: {name} is {value!r}; give a whole number")
    if not space:
        raise UserError(f"{path}: optuna: space is empty; write 'beta: {{low: 0.02, high: 0.5, log: true}}' below it")
    for name, of in space.items():
        _check_range(f"{path}: optuna: {name}", of)
    return search


def _check_range(where: str, of: Any) -> None:
    if isinstance(of, list) and of and all(isinstance(value, str | int | float) for value in of):
        words = [",".join(words_of(value)) for value in of]
        if twins := [word for word in words if words.count(word) > 1]:
            raise UserError(f"{where} has {twins[0]} twice; take one out")
        return
    keys = set(of) if isinstance(of, Mapping) else set()
    ends = [of[key] for key in ("low", "high")] if {"low", "high"} <= keys <= {"low", "high", "log", "step"} else []
    if not ends or not all(isinstance(end, int | float) for end in ends) or ends[0] >= ends[1]:
        raise UserError(f"{where} is {of!r}; give a list of values, or numbers low and high (with log: true, or step)")
    if of.get("log") and (ends[0] <= 0 or "step" in of):
        raise UserError(f"{where}: log needs a low above 0 and no step")


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = read_once(path.read_text())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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
    for key in ("name", "command"):
        _check_value(path, key, content.get(key, ""))
    if not content.get("grid") and not content.get("list") and not content.get("optuna"):
        raise UserError(f"{path} tries nothing: it has neither grid nor list nor optuna")
    return content


def _tried(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the cells differ by: every entry of the list with every combination of the grid."""
    axes = {}
    for name, values in _mapping(path, "grid", content.get("grid")).items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise UserError(f"{path}: grid: {name} is {values!r}; give a list of values, such as [{values}]")
        axes[name] = values
    entries = [{}] if content.get("list") in (None, []) else content["list"]
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
    try:
        named = by_flag_name(content, strip="-")
    except UserError as error:
        raise UserError(f"{path}: {where}: {error}") from None
    for name, value in named.items():
        _check_value(path, f"{where}: {name}", value)
    return named


def _check_value(path: Path, where: str, value: Any) -> None:
    """A flag without a value would be left out, and the cell's name would say that it is tried."""
    for part in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if part is None:
            raise UserError(f"{path}: {where} has no value (null); give one, or take it out")
        if part is not value and isinstance(part, Sequence):
            _check_value(path, where, part)


def _cell(path: Path, fixed: Mapping[str, Any], tried: Mapping[str, Any]) -> Cell:
    flags = {**fixed, **tried}
    for name in OWN:
        if name in flags:
            raise UserError(f"{path}: {name} is given to each cell by the sweep; take it out")
    return Cell(_name(tried), flags)


def _name(tried: Mapping[str, Any]) -> str:
    """``beta=0.1 seed=0``; what no folder's name can hold is replaced, and what is long ends in a digest."""
    words = [f"{name}={','.join(words_of(value))}" for name, value in tried.items()]
    plain = re.sub(r"[^\w .,=+-]+", "-", " ".join(words)).strip(" .-") or "cell"
    if len(plain) <= LONGEST_NAME and plain == " ".join(words):
        return plain
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=4).hexdigest()
    return f"{plain[:LONGEST_NAME]}-{digest}"


def words_of(value: Any) -> list[str]:
    """A value as words of a command line."""
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [word for part in value for word in words_of(part)]
    return [str(value)]
