"""System metrics of a run's hosts.

The first process of each other host tells rank 0, which alone talks to MLflow, through the store that all have met at:
no step waits for it, and no other host needs the server's address or a password.
"""

import json
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from diffdpo.engine.companions import Companions
from diffdpo.settings.credentials import untold

MOST_WAITING = 4000  # samples kept while a server is away: eleven hours of one host

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What was measured on ``host``, the run's ``node`` by number, at ``when`` (seconds)."""

    node: int
    host: str
    when: float
    values: dict[str, float]


class Meter:
    """MLflow's own monitors, so that the names are those that its users know."""

    def __init__(self) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.seconds = float(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10)  # between samples
        self.monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no GPU, or no nvidia-ml-py
            self.monitors.append(GPUMonitor())

    def read(self) -> dict[str, float]:
        """This host now."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values


class SystemMetrics:
    """Metrics of all hosts, on rank 0: measured and heard by a thread, waiting to be sent. ``companions``: None for one
    process."""

    def __init__(self, companions: Companions | None = None):
        self.waiting: deque[Sample] = deque(maxlen=MOST_WAITING)
        self.companions = companions
        members = companions.members if companions is not None else ()
        firsts = [member for member in members if member.local_rank == 0]
        self.others = [(number, member) for number, member in enumerate(firsts) if member.rank != 0]
        self.own = firsts[0].host if firsts else ""
        self._heard: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="system metrics", daemon=True)

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Measure once more, and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _follow(self) -> None:
        try:
            meter, ends = Meter(), False
            while not ends:
                ends = self._stop.wait(meter.seconds)
                self.waiting.append(Sample(0, self.own, time.time(), meter.read()))
                self.listen()
        except Exception as error:  # whatever becomes of it, the run goes on
            log.warning("no more system metrics (%s)", untold(error))

    def listen(self) -> None:
        """Take what other hosts have told since the last time."""
        for number, member in self.others:
            text = self.companions.heard(_key(member.rank)) if self.companions is not None else None
            if text is not None and text != self._heard.get(number):
                self._heard[number] = text
                self.waiting.append(Sample(number, member.host, **json.loads(text)))


def tell_of_this_node(companions: Companions) -> None:
    """Measure this host from now on, in a thread, until the run's end. For the first process of each other host."""
    threading.Thread(target=_tell, args=(companions,), name="system metrics", daemon=True).start()


def _tell(companions: Companions) -> None:
    try:
        meter = Meter()
        while not companions.ended.wait(meter.seconds):
            companions.tell(_key(companions.rank), json.dumps({"when": time.time(), "values": meter.read()}))
    except Exception as error:
        if not companions.ended.is_set():
            log.warning("no more system metrics of this host (%s)", untold(error))


def _key(rank: int) -> str:
    return f"system-{rank}"
