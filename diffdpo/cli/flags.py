"""Settings from the command line: defaults, then a YAML recipe, then flags. No torch in here."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffdpo.command import Parser
from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.settings.base import Settings
from diffdpo.shipped import find_shipped

# The settings when neither a model nor data is named: those that suit what comes with diffdpo
BUNDLED_RECIPE = Path(__file__).parents[1] / "pretrained" / "arithmetic" / "train.yaml"

_UNSET = object()  # tells a flag that was not given from one given with its default


def build_parser(config_class: type[Settings], description: str) -> Parser:
    """A parser with one flag per field, ``--config`` for a recipe, and the ``--local_rank`` that launchers append."""
    parser = Parser(description=description, argument_default=None)
    parser.add_argument("--config", help="YAML recipe; flags override it")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers; the environment decides")
    for item in dataclasses.fields(config_class):
        kind = _flag_type(config_class, item.name)
        text = f"{item.metadata['help']} (default: {item.default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": _UNSET}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
        else:
            options |= {"type": kind, "choices": item.metadata["choices"] or None}
        parser.add_argument(f"--{item.name}", **options)
    parser.formatter_class = _HelpFormatter
    if config_class is TrainConfig:
        bundled = ", ".join(f"{name} {value}" for name, value in read_recipe(config_class, BUNDLED_RECIPE).items())
        parser.epilog = (
            f"Without --model_name_or_path and --train_data these are the defaults: {bundled}. The sft_weight is left "
            "out where --loss_type is given."
        )
    return parser


def parse_config(config_class: type[Settings], argv: Sequence[str], description: str) -> Any:
    """Defaults, then the recipe of ``--config``, then flags; checked. UserError for a recipe's mistake."""
    namespace = vars(build_parser(config_class, description).parse_args(argv))
    flags = {name: value for name, value in namespace.items() if value is not _UNSET}
    recipe, _ = flags.pop("config"), flags.pop("local_rank")
    given = {**(read_recipe(config_class, Path(recipe)) if recipe else {}), **flags}
    return make_config(config_class, with_bundled_recipe(given) if config_class is TrainConfig else given)


def with_bundled_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Preference training's settings, with those of the bundled recipe where neither a model nor data is named."""
    if given.get("model_name_or_path") or given.get("train_data"):
        return dict(given)
    bundled = read_recipe(TrainConfig, BUNDLED_RECIPE)
    if "loss_type" in given:
        bundled.pop("sft_weight", None)  # it goes with the loss of the recipe
    return {**bundled, **given}


def read_recipe(config_class: type[Settings], path: Path) -> dict[str, Any]:
    """The settings of a YAML recipe; each key must be a flag's name and each value of its type."""
    path = find_shipped("recipes", str(path), flag="--config")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--config {path} is not a YAML file: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"--config {path} holds no settings; write lines such as 'learning_rate: 1e-5'")
    allowed = {item.name for item in dataclasses.fields(config_class)}
    unknown = sorted(map(str, set(content) - allowed))
    if unknown:
        raise UserError(f"--config {path} sets {', '.join(unknown)}, which is no flag of this command; see --help")
    return converted(config_class, content, f"--config {path}")


def converted(config_class: type[Settings], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values from YAML or Python as the types of the fields; ``where`` begins the message of a UserError."""
    return {name: _convert(config_class, name, value, where) for name, value in values.items()}


class _HelpFormatter(Parser().formatter_class):  # type: ignore[misc]
    def _get_help_string(self, action):
        return action.help


def _flag_type(config_class: type, name: str) -> type:
    hint = typing.get_type_hints(config_class)[name]
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    return hint


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _convert(config_class: type, name: str, value: Any, where: str) -> Any:
    """A YAML value as the field's type. ``1e-5`` is text in YAML 1.1, so numbers may come as text."""
    kind = _flag_type(config_class, name)
    if value is None:
        if type(None) not in typing.get_args(typing.get_type_hints(config_class)[name]):
            raise UserError(f"{where}: {name} has no value; give one, or leave the line out")
        return None
    try:
        if kind is bool:
            converted: Any = value if isinstance(value, bool) else _boolean(str(value))
        elif isinstance(value, (bool, list, dict)):
            raise ValueError(value)
        else:
            converted = kind(value)
        if kind is int and float(value) != converted:
            raise ValueError(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name} is {value!r}; it must be of type {kind.__name__}") from None
    item = next(f for f in dataclasses.fields(config_class) if f.name == name)
    choices = item.metadata.get("choices")
    if choices and converted not in choices:
        raise UserError(f"{where}: {name} is {value!r}; allowed: {', '.join(choices)}")
    return converted
