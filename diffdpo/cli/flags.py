"""Settings from the command line: defaults, then a YAML recipe, then flags. No torch in here.

Names of TRL and transformers are read as well, in flags and recipes alike (``trl.py``).
"""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.cli import nearest, underscored
from diffdpo.cli import trl
from diffdpo.command import Parser
from diffdpo.config import RunConfig, SftConfig, TrainConfig, bundled_settings, make_config, with_bundled_settings
from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, converted, kind_of
from diffdpo.settings.yaml_text import by_flag_name, read_once
from diffdpo.shipped import find_shipped


def parse_config(config_class: type[Settings], argv: Sequence[str], description: str) -> Any:
    """Defaults, then the recipe of ``--config``, then flags; checked. UserError for a setting's mistake."""
    flags = vars(build_parser(config_class, description).parse_args([*_positive(config_class, argv)]))
    recipe, _ = flags.pop("config", None), flags.pop("local_rank", None)
    in_recipe = read_yaml(Path(recipe)) if recipe else {}
    together = {**in_recipe, **flags}
    given = {
        **own_settings(config_class, in_recipe, beside=together, where=f"--config {recipe}: "),
        **own_settings(config_class, flags, beside=together),
    }
    return make_config(config_class, with_bundled_settings(given) if config_class is TrainConfig else given)


def read_recipe(config_class: type[Settings], path: Path) -> dict[str, Any]:
    """The settings of a YAML recipe; each key must be a flag's name and each value of its type."""
    return own_settings(config_class, read_yaml(path), where=f"--config {path}: ")


def own_settings(
    config_class: type[Settings],
    given: Mapping[str, Any],
    *,
    beside: Mapping[str, Any] | None = None,
    where: str = "",
) -> dict[str, Any]:
    """What a user gave by our names or by TRL's and transformers', as our settings, each of its field's type.

    ``beside``: all that is given, also elsewhere, for names that depend on others. UserError, beginning with ``where``,
    for a name that no setting has, for one that makes no sense here, and for a value of another type.
    """
    try:
        named = own_names(config_class, given, beside=beside)
        return {name: converted(config_class, name, value) for name, value in named.items()}
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def own_names(
    config_class: type[Settings], given: Mapping[str, Any], *, beside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``given`` by our names alone, the values as they are. UserError for a name that has no place here."""
    theirs = trl.TABLE if takes_theirs(config_class) else {}
    ours = {name: value for name, value in given.items() if name not in theirs}
    ours |= trl.translated(given, given if beside is None else beside) if theirs else {}
    for name in ours:
        _check_name(config_class, name)
    return ours


def takes_theirs(config_class: type[Settings]) -> bool:
    """Whether TRL's names mean something to a command: to those that train."""
    return issubclass(config_class, RunConfig)


def _check_name(config_class: type[Settings], name: str) -> None:
    ours = _names(config_class)
    if name in ours:
        return
    for other, command in ((TrainConfig, "train"), (SftConfig, "sft")):
        if name in _names(other):
            raise UserError(f"--{name} is a flag of `{command}`, not of this command (see --help_all)")
    near = nearest(name, [*ours, *(trl.TABLE if takes_theirs(config_class) else ())])
    raise UserError(f"there is no --{name}" + (f"; is --{near} meant?" if near else " (see --help_all)"))


def _names(config_class: type[Settings]) -> list[str]:
    return [item.name for item in dataclasses.fields(config_class)]


def read_yaml(path: Path, *, what: str = "--config", example: str = "learning_rate: 1e-5") -> dict[str, Any]:
    """The settings in a YAML file, or a shipped recipe, as they are written. UserError, beginning with ``what``, for a
    file that is none, holds no settings, or has one twice."""
    path = find_shipped("recipes", str(path), flag=what)
    try:
        content = read_once(path.read_text())
        if isinstance(content, Mapping):
            return by_flag_name(content)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{what} {path} is not a YAML file: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{what} {path}: {error}") from None
    raise UserError(f"{what} {path} holds no settings; write lines such as '{example}'")


# ---------------------------------------------------------------------------------------------------- the parser


def build_parser(config_class: type[Settings], description: str) -> Parser:
    """A parser with one flag per field, ``--config`` for a recipe, and the ``--local_rank`` that launchers append.

    It leaves out what is not given, and values as they are written: recipes, flags and callers are converted and
    checked by the same functions, in the same words.
    """
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    everything = _ShowHelp(config_class, description)
    parser.add_argument("-h", "--help", action=everything.action(everything=False))
    parser.add_argument("--help_all", action=everything.action(everything=True))
    parser.add_argument("--config")
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        options: dict[str, Any] = {"nargs": "+"} if item.metadata["many"] else {}
        if kind_of(hints[item.name]) is bool:
            options = {"nargs": "?", "const": True}
        parser.add_argument(f"--{item.name}", **options)
    if takes_theirs(config_class):
        for name in trl.TABLE:
            parser.add_argument(f"--{name}", nargs="*", action=_Theirs)
        if config_class is not TrainConfig:
            for name in set(_names(TrainConfig)) - set(_names(config_class)):
                parser.add_argument(f"--{name}", nargs="*")  # to be told whose it is
    else:
        parser.add_argument("--local_rank")
    return parser


def _positive(config_class: type[Settings], argv: Sequence[str]) -> Iterator[str]:
    """The words with ``--no_bf16``, as transformers' parser lets one write it, told as ``--bf16 false``."""
    hints = typing.get_type_hints(config_class)
    switches = {name for name in _names(config_class) if kind_of(hints[name]) is bool}
    switches |= trl.TABLE.keys() if takes_theirs(config_class) else set()
    for word in argv:
        name = underscored(word).removeprefix("--")
        negated = name.startswith("no_") and name not in switches and name[3:] in switches
        yield from ("--" + name[3:], "false") if negated and word.startswith("--") else (word,)


class _Theirs(argparse.Action):
    """A name of TRL's: alone it is true; several words are a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else (values or True))


@dataclasses.dataclass(frozen=True)
class _ShowHelp:
    config_class: type[Settings]
    description: str

    def action(self, *, everything: bool) -> type[argparse.Action]:
        config_class, description = self.config_class, self.description

        class Show(argparse.Action):
            def __init__(self, option_strings, dest, **options):
                super().__init__(option_strings, argparse.SUPPRESS, nargs=0)

            def __call__(self, parser, namespace, values, option_string=None):
                print(help_text(config_class, description, prog=parser.prog, everything=everything))
                parser.exit()

        return Show


# ------------------------------------------------------------------------------------------------------- help


def help_text(config_class: type[Settings], description: str, *, prog: str, everything: bool) -> str:
    """What ``--help`` shows: the flags that matter most, a line each; or ``everything``, each with what it allows."""
    parts = [f"usage: {prog} [--config RECIPE] [--FLAG VALUE ...]", description.strip()]
    for title, items in groups(config_class):
        shown = [item for item in items if everything or item.metadata["common"]]
        if shown:
            parts.append("\n".join((f"{title}:", *(_line(config_class, item, everything) for item in shown))))
    parts.append("  --config RECIPE".ljust(NAMES) + "  a YAML file of settings by these names; flags override it")
    if config_class is TrainConfig:
        parts.append(_epilog())
    theirs = " Names of TRL and transformers are read too: see docs/from_trl.md." if takes_theirs(config_class) else ""
    parts.append(f"These are all flags.{theirs}" if everything else f"--help_all shows all flags.{theirs}")
    return "\n\n".join(parts)


def groups(config_class: type[Settings]) -> Iterator[tuple[str, list[dataclasses.Field]]]:
    """The fields under the title of the subject that declares them first, in the order of composition."""
    found: dict[str, list[dataclasses.Field]] = {}
    for item in dataclasses.fields(config_class):
        owner = next(c for c in reversed(config_class.__mro__) if item.name in vars(c).get("__annotations__", ()))
        found.setdefault(owner.title, []).append(item)  # type: ignore[attr-defined]
    yield from found.items()


def _line(config_class: type[Settings], item: dataclasses.Field, everything: bool) -> str:
    text, choices = item.metadata["help"], item.metadata["choices"] or item.metadata["known"]
    if item.default is not None:
        default = str(item.default).lower() if isinstance(item.default, bool) else item.default
        text += f" (default: {default})"
    lines = [f"  --{item.name} {_metavar(config_class, item)}".ljust(NAMES) + f"  {text}"]
    if choices:
        allowed = f"{'each one of' if item.metadata['many'] else 'one of'}: {', '.join(choices)}"
        lines += textwrap.wrap(allowed, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 10)
    return "\n".join(lines)


NAMES, WIDTH = 35, 120  # columns of the names, and of all


def _metavar(config_class: type[Settings], item: dataclasses.Field) -> str:
    kind = kind_of(typing.get_type_hints(config_class)[item.name])
    word = {
        bool: "[false]",
        int: "N",
        float: "X",
        str: "NAME" if item.metadata["choices"] or item.metadata["known"] else "TEXT",
    }[kind]
    return f"{word} ..." if item.metadata["many"] else word


def _epilog() -> str:
    bundled = ", ".join(f"{name} {value}" for name, value in bundled_settings().items())
    text = (
        f"Without --model_name_or_path and --train_data these are the defaults: {bundled}. The sft_weight is left out "
        "where --loss_type is given."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
