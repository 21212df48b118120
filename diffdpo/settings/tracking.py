"""Where a run is recorded."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class TrackingSettings(Settings):
    """MLflow."""

    title: ClassVar[str] = "tracking"

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
