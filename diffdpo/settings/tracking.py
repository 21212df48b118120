"""Where a run is recorded."""

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


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
        if self.register_model and ("/" in self.register_model or ":" in self.register_model):
            raise UserError(f"--register_model {self.register_model!r}: MLflow takes no / and : in a name")

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
