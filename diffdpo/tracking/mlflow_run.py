"""MLflow, fed from ``metrics.jsonl`` by a thread of its own, so that no server can slow a step down or lose a point.

The thread creates the run, sends parameters, then ships new lines in batches. What was sent is noted in ``mlflow.json``
beside the journal, so that a resumed or repeated shipping sends each point once. When the server is away it tries again
with growing pauses; what is left at the end stays in the journal, and ``python -m diffdpo.tracking RUN_DIR`` ships it.
"""

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from data_pipeline.files import write_whole
from diffdpo.errors import TrainingError, UserError
from diffdpo.settings.credentials import PASSWORD, TOKEN, USER, are_told, given_back, hidden, in_a_line, untold
from diffdpo.tracking.journal import FILE, NOTE, parsed, read_journal
from diffdpo.tracking.lock import is_held
from diffdpo.tracking.metric_names import mlflow_name
from diffdpo.tracking.nodes import SystemMetrics
from diffdpo.tracking.shown import send_answers, send_datasets, send_description

STATE_FILE = "mlflow.json"
AT_ONCE = ("config.yaml", "asked.yaml", "environment.json", "ds_config.json", "changes.diff", "sweep.yaml")
AT_THE_END = ("summary.json", "held_out.json", FILE, "plots", "comparison.html", "comparison.csv")
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page opens with runs, not with chat traces
BATCH = 900  # the server takes at most 1000 metrics a call
LARGEST_LINE = 100  # metrics in one line of the journal
INTERVAL = 2.0  # seconds between shipments
LONGEST_PAUSE = 60.0
ABANDONED = 3600.0  # seconds after which a store that is half made is nobody's
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")

log = logging.getLogger(__name__)


@dataclass
class Shipped:
    """What MLflow has: the run, and the newest step of every metric. ``mlflow.json``."""

    tracking_uri: str
    experiment: str
    run_name: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"  # of the run itself, to be told to MLflow at the end
    run_id: str | None = None
    experiment_id: str | None = None
    datasets: list[dict[str, str]] = field(default_factory=list)  # name, context, digest, source, records
    described: bool = False  # parameters, tags, datasets and the files that are known at the start are there
    delivered: bool = False  # everything, the final status too
    last_step: dict[str, int] = field(default_factory=dict)
    needs_credentials: bool = False  # the store was told who asks, which stands in no file

    @classmethod
    def read(cls, output_dir: Path) -> "Shipped":
        """UserError where there is none, or none that can be read."""
        try:
            return cls(**json.loads((output_dir / STATE_FILE).read_text()))
        except FileNotFoundError:
            raise UserError(f"{output_dir} has no {STATE_FILE}; give the output folder of a run") from None
        except (ValueError, TypeError):
            raise UserError(
                f"{output_dir / STATE_FILE} is damaged or empty; resume the run, which sends everything to a new "
                "MLflow run, or remove the file"
            ) from None

    def write(self, output_dir: Path) -> None:
        write_whole(output_dir / STATE_FILE, json.dumps(asdict(self), indent=1).encode())


def sqlite_uri(path: Path) -> str:
    """The store in a file. In a URI ? begins a query and # a fragment: those of a folder's name are written as %3F."""
    return "sqlite:///" + re.sub("[%?#]", lambda found: quote(found[0]), str(path))


def check_tracking_uri(uri: str, source: str = "--tracking_uri") -> None:
    """UserError for a store MLflow cannot use."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in SCHEMES:
        shown = hidden(uri) if "://" in uri else uri.rpartition("@")[2]
        raise UserError(
            f"{source} {shown} is no MLflow store; allowed: {'none, ' if source.startswith('--') else ''}"
            "sqlite:////abs/path/mlflow.db, http(s)://host:port"
        )


class MlflowRun:
    """One run in MLflow. Made on rank 0 only; ``start`` returns at once, ``close`` in time."""

    def __init__(self, output_dir: Path, shipped: Shipped, system: SystemMetrics | None = None):
        self.output_dir, self.shipped, self.system = output_dir, shipped, system
        self.error: Exception | None = None  # of the newest failed attempt
        self._client: Any = None
        self._position = 0
        self._notes: dict[int, list[str]] = {}  # of a step there may be several, and one tag
        self._others_due = True
        self._described = False  # by this process; a resumed run has written some of its files anew
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ship_until_stopped, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin shipping in the background."""
        self.shipped.status, self.shipped.delivered = "RUNNING", False
        self.shipped.write(self.output_dir)  # also when no server is ever reached: what is to be sent, and where
        if self.system is not None:
            self.system.start()
        self._thread.start()

    def close(self, status: str, *, timeout: float) -> bool:
        """Ship what is left, then the run's files and the final status (FINISHED, FAILED or KILLED).

        Returns after at most ``timeout`` seconds whether all of it arrived, whatever the server does: a request that it
        holds is left to a thread that ends with the process.
        """
        self.shipped.status = status
        with suppress(OSError):  # a full disk; the journal's writer tells of it
            self.shipped.write(self.output_dir)
        self._stop.set()
        if self.system is not None:
            self.system.stop()
        until = time.monotonic() + timeout
        closing = threading.Thread(target=self._ship_until, args=(until,), name="mlflow-close", daemon=True)
        closing.start()
        closing.join(max(0.0, timeout))
        if closing.is_alive():
            self.error = self.error or TimeoutError(f"no answer within {timeout:.0f} s (--tracking_timeout)")
        return self.shipped.delivered

    def _ship_until(self, until: float) -> None:
        """Ship everything, again and again until the time is over."""
        waited, pause = threading.Event(), 0.5
        if self._thread.is_alive():
            self._thread.join()
        while True:
            try:
                self.ship_all()
                return
            except Exception as error:  # whatever the server does, the run's own files are safe
                self.error = error
            if time.monotonic() + pause > until:
                return
            waited.wait(pause)
            pause *= 2

    def ship(self) -> None:
        """Send everything that is in the journal and not in MLflow yet. Raises what MLflow raises."""
        self._connect()
        self._describe()
        journal = self.output_dir / FILE
        while journal.exists():
            metrics, end = self._next_batch(journal)
            if not metrics:
                self._position = end
                return
            self._client.log_batch(self.shipped.run_id, metrics=metrics)
            for metric in metrics:
                self.shipped.last_step[metric.key] = metric.step
            self.shipped.write(self.output_dir)
            self._position = end

    def ship_all(self) -> None:
        """Ship everything of a run that has ended: points, files, status. Raises what MLflow raises."""
        self.ship()
        self._ship_system()
        self._send_files(AT_THE_END if self._described else AT_ONCE + AT_THE_END)
        send_answers(self._client, self.shipped.run_id, self.output_dir)
        send_description(self._client, self.shipped.run_id, self.output_dir)
        if self.shipped.status != "RUNNING":
            self._client.set_terminated(self.shipped.run_id, self.shipped.status)
            self.shipped.delivered = True
            self.shipped.write(self.output_dir)

    def _ship_until_stopped(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            try:
                self.ship()
                self._ship_system()
                self._ship_others()
                pause = INTERVAL
            except Exception as error:
                if self.error is None:
                    log.warning(
                        "MLflow does not answer (%s); training goes on, metrics are kept in %s", untold(error), FILE
                    )
                self.error = error
                pause = min(LONGEST_PAUSE, max(INTERVAL, 2 * pause))

    def _connect(self) -> None:
        if self._client is None:
            self._client = client_of(self.shipped.tracking_uri)
        if self.shipped.run_id is None:
            self.shipped.experiment_id = self._experiment()
            run = self._client.create_run(
                self.shipped.experiment_id, run_name=self.shipped.run_name, tags=self.shipped.tags
            )
            self.shipped.run_id = run.info.run_id
            self.shipped.write(self.output_dir)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.shipped.experiment)
        if found is not None:
            return found.experiment_id
        return self._client.create_experiment(
            self.shipped.experiment, artifact_location=self._artifact_location(), tags=KIND
        )

    def _artifact_location(self) -> str | None:
        """Absolute, beside an sqlite file; a server decides for itself."""
        file = sqlite_file(self.shipped.tracking_uri)
        return (file.resolve().parent / "mlartifacts").as_uri() if file else None

    def _describe(self) -> None:
        if self.shipped.described:
            return
        from mlflow.entities import Param

        params = [Param(key, str(value)[:6000]) for key, value in self.shipped.params.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self.shipped.run_id, params=params[start : start + 100])
        send_datasets(self._client, self.shipped.run_id, self.shipped.datasets)
        send_description(self._client, self.shipped.run_id, self.output_dir)
        self._send_files(AT_ONCE)
        self.shipped.described = self._described = True
        self.shipped.write(self.output_dir)

    def _next_batch(self, journal: Path) -> tuple[list[Any], int]:
        """Metrics of the next lines, a call's worth, and the byte where they end."""
        from mlflow.entities import Metric

        metrics: list[Any] = []
        end = self._position
        with journal.open("rb") as file:
            file.seek(end)
            for raw in file:
                if not raw.endswith(b"\n") or len(metrics) > BATCH - LARGEST_LINE:
                    break
                end += len(raw)
                if (line := parsed(raw)) is None:  # damaged; the journal's next opening tells of it
                    continue
                step, when, note = line.pop("step"), int(1000 * line.pop("time")), line.pop(NOTE, None)
                if note is not None:
                    self._notes[step] = [*(text for text in self._notes.get(step, []) if text != note), note]
                    self._client.set_tag(self.shipped.run_id, f"{NOTE}.step-{step}", "; ".join(self._notes[step]))
                named = {mlflow_name(key): value for key, value in line.items() if value is not None}
                new = {k: v for k, v in named.items() if step > self.shipped.last_step.get(k, -1)}
                metrics += [Metric(key, value, when, step) for key, value in new.items()]
        return metrics, end

    def _send_files(self, names: Sequence[str]) -> None:
        for path in (self.output_dir / name for name in names):
            if path.is_dir():
                self._client.log_artifacts(self.shipped.run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self.shipped.run_id, str(path))

    def _ship_others(self) -> None:
        """What earlier runs beside this one could not send to the same store; once."""
        others, self._others_due = self._others_due, False
        for path in self.output_dir.parent.glob(f"*/{STATE_FILE}") if others else ():
            if path.parent == self.output_dir or self._stop.is_set() or is_held(path.parent):  # the living send theirs
                continue
            try:
                other = Shipped.read(path.parent)
                if other.tracking_uri == self.shipped.tracking_uri and not other.delivered:
                    ship_later(path.parent)
            except (UserError, TrainingError) as error:
                log.warning("an earlier run beside this one is not sent: %s", error)

    def _ship_system(self) -> None:
        """What was measured on the run's hosts: ``system/...``, of other hosts ``system/1/...`` and the tag ``node.1``
        with the host's name. Of a server that is away nothing is lost while the run lives."""
        from mlflow.entities import Metric

        waiting, run_id = self.system.waiting if self.system is not None else (), self.shipped.run_id
        while waiting:
            sample = waiting[0]
            prefix = f"system/{sample.node}" if sample.node else "system"
            step = self.shipped.last_step.get(prefix, -1) + 1
            when = int(1000 * sample.when)
            metrics = [Metric(f"{prefix}/{key}", value, when, step) for key, value in sample.values.items()]
            if sample.node and step == 0:
                self._client.set_tag(run_id, f"node.{sample.node}", sample.host)
            self._client.log_batch(run_id, metrics=metrics)
            self.shipped.last_step[prefix] = step
            self.shipped.write(self.output_dir)
            waiting.popleft()


def client_of(uri: str) -> Any:
    """MLflow's client of a store, which says on the screen what went wrong and nothing else."""
    quiet_mlflow()
    import mlflow

    for name in ("mlflow", "alembic"):  # mlflow's import has set its own level
        logging.getLogger(name).setLevel(logging.ERROR)
    if (file := sqlite_file(uri)) and not file.exists() and file.parent.is_dir():
        _create_whole(file)
    return mlflow.MlflowClient(given_back(uri))


def sqlite_file(uri: str) -> Path | None:
    """The file of an sqlite store; None for others."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def _create_whole(file: Path) -> None:
    """A new store under its name only when all its tables are there: MLflow makes them one by one, for many seconds on
    a busy machine, and what a process that was killed meanwhile leaves behind can never be opened again."""
    import mlflow

    for left in file.parent.glob(f"{file.name}.*.partial*"):  # by a process that was killed; a living one is younger
        if time.time() - left.stat().st_mtime > ABANDONED:
            left.unlink(missing_ok=True)
    # another name for every attempt: MLflow makes the tables of an address once a process
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    try:
        mlflow.MlflowClient(sqlite_uri(partial)).search_experiments(max_results=1)
        try:
            os.link(partial, file)
        except FileExistsError:  # another run's
            pass
        except OSError:  # a file system without links, where two runs that begin at once may not both be told of
            if not file.exists():
                partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def quiet_mlflow() -> None:
    """Our own loop does the retrying; MLflow's would hold a call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def missing_credentials(shipped: Shipped) -> str:
    """What to do where the run was sent with a name and a password that this process does not have; else ''."""
    if not shipped.needs_credentials or are_told(shipped.tracking_uri):
        return ""
    return f" with {USER} and {PASSWORD} (or {TOKEN}) set, which the run had and no file holds"


def ship_later(output_dir: Path) -> int:
    """Send what a run could not send while it ran. Returns the number of lines in the journal.

    TrainingError, in one line, when MLflow does not take it.
    """
    run = MlflowRun(output_dir, Shipped.read(output_dir))
    if run.shipped.status == "RUNNING" and not is_held(output_dir):
        run.shipped.status = "KILLED"  # it has told nobody of its end
    try:
        run.ship_all()
    except Exception as error:  # every kind of store fails in its own way
        reason = in_a_line(error)
        raise TrainingError(
            f"{run.shipped.tracking_uri} does not take the run ({reason}); nothing is lost, send it again later"
            + missing_credentials(run.shipped)
        ) from error
    journal = output_dir / FILE
    return sum(1 for _ in read_journal(journal)) if journal.exists() else 0
