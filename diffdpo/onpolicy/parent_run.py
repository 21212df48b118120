"""The MLflow run that the runs of all rounds belong to. Tracking that fails costs nothing but the record."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from diffdpo.tracking.mlflow_run import client_of

log = logging.getLogger(__name__)
STATE = "mlflow_parent_run"


class ParentRun:
    """``run_id`` is None where nothing is tracked."""

    def __init__(self, folder: Path, uri: str | None, experiment: str, settings: Mapping[str, Any]):
        self.run_id: str | None = None
        if uri is None:
            return
        try:
            self.client = client_of(uri)
            file = folder / STATE
            if file.exists():
                self.run_id = file.read_text().strip()
                self.client.update_run(self.run_id, status="RUNNING")
                return
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            run = self.client.create_run(number, run_name=folder.name)
            for name, value in settings.items():
                self.client.log_param(run.info.run_id, name, str(value))
            write_whole(file, run.info.run_id.encode())
            self.run_id = run.info.run_id
        except Exception as error:  # whatever a tracking server does
            self._give_up(error)

    def round_done(self, number: int, numbers: Mapping[str, float]) -> None:
        """Metrics of the parent, a step a round."""
        if self.run_id is None:
            return
        try:
            for name, value in numbers.items():
                self.client.log_metric(self.run_id, name, value, step=number)
        except Exception as error:
            self._give_up(error)

    def close(self, status: str) -> None:
        """FINISHED, or FAILED."""
        if self.run_id is None:
            return
        try:
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("MLflow takes no parent run (%s); rounds are recorded in their folders", str(error).split("\n")[0])
        self.run_id = None
