"""Where a run is recorded."""

import importlib.util
import re
from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting

ALIAS = "newest"
LONGEST_MODEL, LONGEST_ALIAS = 256, 255  # characters of a name in MLflow's tables, and of an alias


@dataclass(frozen=True, kw_only=True)
class TrackingSettings(Settings):
    """MLflow."""

    title: ClassVar[str] = "tracking"

    report_to: str = setting(
        "mlflow", "who is told beside metrics.jsonl", choices=("mlflow", "tensorboard", "wandb", "none"), many=True
    )
    experiment_name: str = setting("diffdpo", "MLflow experiment")
    tracking_uri: str | None = setting(
        None,
        "MLflow store; default: $MLFLOW_TRACKING_URI, else sqlite above --output_dir; 'none': off",
        common=True,
    )
    tracking_timeout: float = setting(
        5.0,
        "seconds the end of a run waits for a server; the rest is sent later by `python -m diffdpo.tracking`",
        at_least=0,
    )
    run_tags: str | None = setting(None, "tags of the MLflow run, such as team=nlp data=v2; default: none", many=True)
    register_model: str | None = setting(
        None, "make the final model a version of this name in MLflow's registry (or NAME@ALIAS); default: not"
    )

    def check(self) -> None:
        """Every tag has a name, and a model to be registered has a store."""
        self.tags()
        if "none" in self.trackers() and len(self.trackers()) > 1:
            raise UserError(f"--report_to {self.report_to}: none stands alone")
        for name in ("tensorboard", "wandb"):
            if name in self.trackers() and importlib.util.find_spec(name) is None:
                raise UserError(f"--report_to {name}: it is not installed; pip install 'diffdpo[{name}]'")
        if self.register_model and (self.tracking_uri == "none" or "mlflow" not in self.trackers()):
            raise UserError(
                "--register_model needs MLflow; leave out --tracking_uri none, and have mlflow in --report_to"
            )
        if self.register_model:
            name_and_alias(self.register_model)

    def trackers(self) -> list[str]:
        """The words of ``--report_to``."""
        return [word.strip() for word in self.report_to.split(",")]

    def tags(self) -> dict[str, str]:
        """``--run_tags`` by name. UserError for one without a name or a value."""
        found = {}
        for word in (self.run_tags or "").split(",") if self.run_tags else ():
            name, equals, value = word.partition("=")
            if not equals or not name.strip():
                raise UserError(f"--run_tags {word!r} is no tag; write name=value")
            found[name.strip()] = value.strip()
        return found


def name_and_alias(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAME@ALIAS`` of ``--register_model``. UserError for what MLflow does not take.

    The rules are those of ``mlflow/utils/validation.py``, written again: settings are read where MLflow is not
    imported, and it would only tell after the training.
    """
    name, at, alias = text.partition("@")
    where = f"--register_model {text!r}"
    if not name.strip() or any(sign in name for sign in "/:"):
        raise UserError(f"{where}: give a name without / and :, or NAME@ALIAS")
    if name == "." or name.startswith(".."):
        raise UserError(f"{where}: MLflow takes no name that could be a folder; give one that does not begin with ..")
    if len(name) > LONGEST_MODEL or len(alias) > LONGEST_ALIAS:
        raise UserError(f"{where} is too long; MLflow takes {LONGEST_MODEL} characters, {LONGEST_ALIAS} of an alias")
    if at and not re.fullmatch(r"[\w-]+", alias):
        raise UserError(f"{where}: the alias is {alias!r}; allowed: letters, digits, _ and -, at least one of them")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(f"{where}: MLflow keeps the alias {alias} for itself; give another")
    return name, alias or ALIAS
