"""Settings of one subject: a dataclass whose fields are flags, with their ranges. No torch in this package.

A subject (data, engine, noise, ...) derives a class from :class:`Settings` and checks what concerns it alone in its
method ``check``; ``config.py`` composes these classes into the settings of a command, whose fields stay flat. Those of
the losses stand in ``losses/settings.py``: a loss's parameters are declared beside the losses.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.credentials import hidden


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    known: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    common: bool = False,
    many: bool = False,
    share: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field with a flag's help. ``choices`` and the three bounds are checked by :func:`check_settings`.

    ``known``: words that ``--help_all`` lists like choices, of a table to which others may add and which is asked
    elsewhere; ``refused``: words one might try, each with why it is no choice; ``common``: among the few that
    ``--help`` shows; ``many``: a list, held as text with commas, of which ``choices`` allows each; ``share``: a number
    of steps, or below 1 a share of all; ``secret``: never written down.
    """
    metadata = {"help": help, "common": common, "many": many, "share": share, "secret": secret}
    bounds = {
        "choices": choices,
        "known": known,
        "refused": refused or {},
        "at_least": at_least,
        "above": above,
        "below": below,
    }
    return field(default=default, repr=not secret, metadata=metadata | bounds)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one subject. ``title`` heads them in ``--help``."""

    title: ClassVar[str] = ""

    def check(self) -> None:
        """UserError for what can be known wrong without opening a model or data."""


def check_settings(settings: Settings) -> None:
    """Ranges and choices of every field, then each subject's own ``check``, in the order of composition. UserError."""
    for item in dataclasses.fields(settings):
        check_field(item, getattr(settings, item.name))
    for subject in reversed(type(settings).__mro__):
        if issubclass(subject, Settings) and "check" in vars(subject):
            subject.check(settings)


def check_field(item: dataclasses.Field, value: Any) -> None:
    """UserError for an empty text, a number that is not finite or out of bounds, or a word that is no choice."""
    name, bounds = item.name, item.metadata
    if value is None:
        return
    if value == "":
        raise UserError(f"--{name} is empty; give a value, or leave it out")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} is {value}; give a number")
    if value in bounds.get("refused", {}):
        raise UserError(f"--{name} {value} is not offered: {bounds['refused'][value]}")
    for word in (part.strip() for part in value.split(",")) if bounds.get("many") else (value,):
        if bounds.get("choices") and word not in bounds["choices"]:
            raise UserError(f"--{name} is {word!r}; allowed: {', '.join(bounds['choices'])}")
    low, open_low, high = (bounds.get(key) for key in ("at_least", "above", "below"))
    if low is not None and high is not None and not low <= value < high:
        raise UserError(f"--{name} is {value}; it must be in [{low:g}, {high:g})")
    if low is not None and value < low:
        raise UserError(f"--{name} is {value}; it must be at least {low:g}")
    if open_low is not None and value <= open_low:
        raise UserError(f"--{name} is {value}; it must be above {open_low:g}")
    if bounds.get("share") and value > 1 and value != int(value):
        raise UserError(f"--{name} is {value}; give a whole number of steps, or a share of all that is below 1")


def changed(settings: Settings, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields that are not at their default, or at the one of ``usual`` where that has another, as they may be
    shown."""
    shown, usual = public(settings), usual or {}
    return {
        item.name: shown[item.name]
        for item in dataclasses.fields(settings)
        if getattr(settings, item.name) != usual.get(item.name, item.default)
    }


def public(settings: Settings) -> dict[str, Any]:
    """All fields by name, for records that others may read: those that are secret are left empty, and addresses are
    shown without the passwords in them."""
    shown = {key: hidden(value) if isinstance(value, str) else value for key, value in vars(settings).items()}
    return shown | {item.name: None for item in dataclasses.fields(settings) if item.metadata.get("secret")}


def without_secrets(words: list[str], settings: Settings) -> list[str]:
    """A command line for the record, with secret values, and passwords in addresses, replaced by ***."""
    words = [hidden(word) for word in words]
    secrets = [getattr(settings, item.name) for item in dataclasses.fields(settings) if item.metadata.get("secret")]
    for secret in filter(None, secrets):
        words = [word.replace(secret, "***") for word in words]
    return words


# ------------------------------------------------------------------------------------------ values as they are given


def converted(settings_class: type[Settings], name: str, value: Any) -> Any:
    """A value from a command line, a recipe or a caller as the field's type. UserError where it cannot be one.

    Numbers may come as text: ``1e-5`` is text in YAML 1.1. Lists become text with commas, mappings JSON.
    """
    hint = typing.get_type_hints(settings_class)[name]
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise UserError(f"--{name} has no value; give one, or leave it out")
        return None
    item = field_of(settings_class, name)
    kind = kind_of(hint)
    if item.metadata.get("many") and isinstance(value, (list, tuple)):
        return _joined(name, value)
    if kind is str and isinstance(value, Mapping):
        return json.dumps(value)
    return of_kind(f"--{name}", value, kind, convert=_steps if item.metadata.get("share") else None)


def of_kind(name: str, value: Any, kind: type, *, convert: Callable[[Any], Any] | None = None) -> Any:
    """``value`` as a bool, int, float or str, or what ``convert`` makes of it. UserError, with ``name``, where it
    cannot be one."""
    try:
        return convert(value) if convert else _of_kind(value, kind)
    except (TypeError, ValueError, OverflowError, KeyError):
        raise UserError(f"{name} is {value!r}; it must be {KINDS[kind]}") from None


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def field_of(settings_class: type[Settings], name: str) -> dataclasses.Field:
    """The field of this name."""
    return next(item for item in dataclasses.fields(settings_class) if item.name == name)


def kind_of(hint: Any) -> type:
    """bool, int, float or str: what a field holds when it is not None. A number of steps or a share is a float."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return float if float in kinds else kinds[0]


def _of_kind(value: Any, kind: type) -> Any:
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(value)
    if kind is bool:
        return value if isinstance(value, bool) else WORDS[str(value).lower()]
    if kind is int and not str(value).lstrip("+-").isdecimal():  # 1e3, 1000.0
        return _whole(float(value))
    return kind(value)


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(number)
    return int(number)


def _steps(value: Any) -> int | float:
    number = _of_kind(value, float)
    return int(number) if math.isfinite(number) and number == int(number) else number


def _joined(name: str, values: list | tuple) -> str:
    words = [str(value).strip() for value in values]
    for word in words:
        if len(words) > 1 and "," in word and Path(word).exists():
            raise UserError(f"--{name}: {word!r} has a comma and cannot stand beside others; rename it")
    return ",".join(words)
