"""The MLflow run of a sweep: the parent under which MLflow shows the runs of its cells."""

from collections.abc import Sequence
from pathlib import Path

from diffdpo.settings.credentials import untold
from diffdpo.sweep.grid import Cell, Grid
from diffdpo.tracking.mlflow_run import STATE_FILE, MlflowRun, Shipped, client_of

TAG = "mlflow.parentRunId"


class Parent:
    """``run_id``: None where there is no store, or none that answered yet."""

    def __init__(self, grid: Grid, folder: Path, uri: str | None):
        self.folder, self.run, self.error = folder, None, ""
        if uri is None:
            return
        tags = {"diffdpo.sweep": f"{len(grid.cells)} runs", "mlflow.source.name": "diffdpo sweep"}
        shipped = Shipped(
            uri, grid.experiment, grid.name, {"cells": str(len(grid.cells)), "command": grid.command}, tags
        )
        if (folder / STATE_FILE).exists():
            known = Shipped.read(folder)
            shipped = known if known.tracking_uri == uri else shipped
        shipped.status, shipped.delivered = "RUNNING", False
        shipped.write(folder)
        self.run = MlflowRun(folder, shipped)
        self._try(self.run.ship)

    @property
    def run_id(self) -> str | None:
        """MLflow's."""
        return self.run.shipped.run_id if self.run else None

    def close(self, cells: Sequence[Cell], status: str) -> None:
        """Send the comparison and the status; the cells that have a run become its children, if they were not."""
        if self.run is None:
            return
        self.run.shipped.status = status
        self.run.shipped.write(self.folder)
        self._try(self.run.ship_all)
        self._try(lambda: self._adopt(cells))

    def _adopt(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            folder = self.folder / cell.name
            shipped = Shipped.read(folder) if (folder / STATE_FILE).exists() else None
            if shipped and shipped.run_id and self.run_id and TAG not in shipped.tags:
                client_of(shipped.tracking_uri).set_tag(shipped.run_id, TAG, self.run_id)

    def _try(self, work) -> None:
        """What a store does not take is kept, and told at the end."""
        try:
            work()
            self.error = ""
        except Exception as error:  # every kind of store fails in its own way
            self.error = " ".join(untold(error).split())[:150]
