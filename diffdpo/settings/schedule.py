"""The learning rate over the run: its peak, the warm-up, and the schedule after it by transformers' names."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, field_of, setting

SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
"""Name of transformers → arguments. ``train/schedule.py`` has their formulas; a test holds the two together."""

NOT_OFFERED = dict.fromkeys(
    ("reduce_lr_on_plateau", "greedy"),
    "it follows a measured loss, and the rate here is a function of the step alone, so that a resumed run is the same",
)
NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Arguments of which a schedule needs just one."""

POLYNOMIAL_END = 1e-7  # the rate at which "polynomial" ends where lr_end is not given
RAMPS = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Settings):
    """The learning rate."""

    title: ClassVar[str] = "learning rate"

    learning_rate: float | None = setting(
        None,
        "peak; default: 5e-7, 5e-6 with --use_peft, 1e-4 for the bundled model on your data",
        at_least=0,
        common=True,
    )
    lr_scheduler_type: str = setting(
        "cosine", "the rate after the warm-up", choices=tuple(SCHEDULES), refused=NOT_OFFERED
    )
    lr_scheduler_kwargs: str | None = setting(
        None, """its arguments as JSON, such as '{"min_lr_rate": 0.1}'; default: those of transformers"""
    )
    warmup_steps: int | float = setting(10, "steps of linear warm-up, or their share of all", at_least=0, share=True)

    def check(self) -> None:
        """Arguments that the schedule does not take, or lacks."""
        self.scheduler_arguments()
        if self.lr_scheduler_type == "constant" and self.warmup_steps not in (0, _default(type(self), "warmup_steps")):
            raise UserError(
                "--lr_scheduler_type constant has no warm-up; use constant_with_warmup, or leave --warmup_steps out"
            )
        if self.learning_rate:
            self.check_peak(self.learning_rate)

    def scheduler_arguments(self) -> dict[str, Any]:
        """``--lr_scheduler_kwargs`` as a dict. UserError for what the schedule does not take, or lacks."""
        kind, given = self.lr_scheduler_type, _json_object(self.lr_scheduler_kwargs)
        allowed, needed = SCHEDULES[kind], NEEDED.get(kind)
        for name, value in given.items():
            if name not in allowed:
                takes = f"takes {', '.join(allowed)}" if allowed else "takes no arguments"
                raise UserError(f"--lr_scheduler_kwargs has {name!r}; --lr_scheduler_type {kind} {takes}")
            _check_argument(name, value)
        if needed and len(given.keys() & set(needed)) != 1:
            raise UserError(
                f"--lr_scheduler_type {kind} needs {' or '.join(needed)} in --lr_scheduler_kwargs, such as "
                f"""'{{"{needed[-1]}": {100 if needed[-1].endswith("steps") else 0.1}}}'"""
            )
        return given

    def check_peak(self, peak: float) -> None:
        """UserError where the rate would end above the peak that it starts from."""
        arguments = self.scheduler_arguments()
        default = POLYNOMIAL_END if self.lr_scheduler_type == "polynomial" else 0.0
        end = arguments.get("lr_end", arguments.get("min_lr", default))
        if end and end >= peak:
            raise UserError(
                f"--learning_rate {peak:g} is not above {end:g}, where --lr_scheduler_type {self.lr_scheduler_type} "
                "ends; set the end in --lr_scheduler_kwargs"
            )


def _default(settings: type[Settings], name: str) -> Any:
    return field_of(settings, name).default


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        given = json.loads(text) if text else {}
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"""--lr_scheduler_kwargs {text}: give a JSON object, such as '{{"min_lr_rate": 0.1}}'""")
    return given


def _check_argument(name: str, value: Any) -> None:
    if name.endswith("_type"):
        fits, wanted = value in RAMPS, f"one of {', '.join(RAMPS)}"
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        wanted = "a number, at least 0"
    if not fits:
        raise UserError(f"--lr_scheduler_kwargs: {name} is {value!r}; it must be {wanted}")
