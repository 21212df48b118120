"""The record of a run on rank 0: the journal, and MLflow unless it is switched off."""

import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffdpo import __version__
from diffdpo.engine.companions import Companions
from diffdpo.errors import UserError
from diffdpo.settings.credentials import STORE, are_told, taken, untold
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import (
    STATE_FILE,
    MlflowRun,
    Shipped,
    check_tracking_uri,
    missing_credentials,
    sqlite_uri,
)
from diffdpo.tracking.nodes import SystemMetrics
from diffdpo.tracking.plots import plot_curves, plot_memory, plot_time
from diffdpo.tracking.readers import SINKS, Reader

log = logging.getLogger(__name__)


class Tracking:
    """``journal`` is written by the loop; MLflow is fed from it in the background."""

    def __init__(self, output_dir: Path, journal: Journal):
        self.output_dir, self.journal = output_dir, journal
        self.mlflow: MlflowRun | None = None
        self.readers: list[Reader] = []

    def start_readers(self, names: Sequence[str], run_name: str, project: str, config: Mapping[str, Any]) -> None:
        """Feed the other trackers that are named."""
        self.readers = [Reader(name, self.output_dir, run_name, project, config) for name in names if name in SINKS]
        for reader in self.readers:
            reader.start()

    def start_mlflow(self, shipped: Shipped, *, elsewhere: bool = False, companions: Companions | None = None) -> None:
        """Begin a run, or go on with the one this folder already has.

        ``elsewhere``: the user named a store; if the folder's run is in another, a new run there gets everything.
        ``companions``: through whom other hosts are measured.
        """
        if (self.output_dir / STATE_FILE).exists():
            try:
                known = Shipped.read(self.output_dir)
                if not elsewhere or known.tracking_uri == shipped.tracking_uri:
                    shipped = known
            except UserError:
                log.warning("%s is damaged; a new MLflow run gets all of the journal", self.output_dir / STATE_FILE)
        shipped.needs_credentials = shipped.needs_credentials or are_told(shipped.tracking_uri)
        if missing := missing_credentials(shipped):
            log.warning("%s will hardly take this run; resume it%s", shipped.tracking_uri, missing)
        self.mlflow = MlflowRun(self.output_dir, shipped, SystemMetrics(companions))
        self.mlflow.start()

    def close(self, status: str, *, timeout: float, curves: bool) -> bool:
        """Draw the curves, ship what is left and the run's files, set the final status, in about ``timeout`` seconds
        however long the server takes. True when all arrived."""
        faults: dict[str, None] = {}
        for work in (self.journal.close, *(self._plots() if curves else ())):
            try:
                work()
            except OSError as error:  # a full disk must not hide what has ended the run
                faults[str(error)] = None
        for fault in faults:
            log.warning("the record of the run in %s is not whole: %s", self.output_dir, fault)
        until = time.monotonic() + timeout
        arrived = self.mlflow is None or self.mlflow.close(status, timeout=timeout)
        for reader in self.readers:
            if not reader.close(status, timeout=max(1.0, until - time.monotonic())):
                log.warning("%s has not all of this run (%s)", reader.name, untold(reader.error))
        return arrived

    def _plots(self) -> tuple[Callable[[], object], ...]:
        return tuple(partial(plot, self.output_dir) for plot in (plot_curves, plot_time, plot_memory))


def tracking_uri(given: str | None, output_dir: Path) -> str | None:
    """``--tracking_uri``, by default what MLFLOW_TRACKING_URI says, else an sqlite file in the folder above the run's;
    None for ``none``. UserError for one that MLflow cannot use."""
    if given == "none":
        return None
    if given is None and (named := os.environ.get(STORE)):
        uri = taken(named, STORE)
        check_tracking_uri(uri, STORE)
        return uri
    uri = given or sqlite_uri(output_dir.parent / "mlflow.db")
    check_tracking_uri(uri)
    return uri


def named_elsewhere(given: str | None) -> bool:
    """Whether the environment, and no setting, names the store."""
    return given is None and bool(os.environ.get(STORE))


def run_tags(git: Mapping[str, Any] | None) -> dict[str, str]:
    """Version, and the commit of the code where it is a git checkout (``git``: {commit, dirty})."""
    tags = {"diffdpo.version": __version__, "mlflow.source.name": "diffdpo"}
    if git is None:
        return tags  # installed from a wheel, or no git
    return tags | {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}


def open_command(uri: str) -> str:
    """What shows the runs in a browser, to be pasted into a shell."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
