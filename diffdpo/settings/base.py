"""Settings of one subject: a dataclass whose fields are flags, with their ranges. No torch in this package.

A subject (data, engine, noise, ...) derives a class from :class:`Settings` and checks what concerns it alone in its
method ``check``; ``config.py`` composes these classes into the settings of a command, whose fields stay flat. Those of
the losses stand in ``losses/settings.py``: a loss's parameters are declared beside the losses.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffdpo.errors import UserError


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    common: bool = False,
) -> Any:
    """A dataclass field with a flag's help. ``choices`` and the three bounds are checked by :func:`check_settings`;
    ``common``: among the few that ``--help`` shows."""
    metadata = {"help": help, "choices": choices, "common": common}
    return field(default=default, metadata=metadata | {"at_least": at_least, "above": above, "below": below})


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
    if bounds.get("choices") and value not in bounds["choices"]:
        raise UserError(f"--{name} is {value!r}; allowed: {', '.join(bounds['choices'])}")
    low, open_low, high = (bounds.get(key) for key in ("at_least", "above", "below"))
    if low is not None and high is not None and not low <= value < high:
        raise UserError(f"--{name} is {value}; it must be in [{low:g}, {high:g})")
    if low is not None and value < low:
        raise UserError(f"--{name} is {value}; it must be at least {low:g}")
    if open_low is not None and value <= open_low:
        raise UserError(f"--{name} is {value}; it must be above {open_low:g}")


def changed(settings: Settings) -> dict[str, Any]:
    """The fields that are not at their default."""
    return {
        item.name: getattr(settings, item.name)
        for item in dataclasses.fields(settings)
        if getattr(settings, item.name) != item.default
    }
