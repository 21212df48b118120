"""Other trackers, fed from ``metrics.jsonl`` by a thread of their own, as MLflow is: TensorBoard and Weights & Biases.

The journal is the record. A run that is resumed writes TensorBoard's files anew from it, so no point is lost or double;
Weights & Biases goes on with the run of the id in ``wandb.json``.
"""

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from diffdpo.settings.credentials import untold
from diffdpo.tracking.journal import FILE, NOTE, parsed

INTERVAL = 2.0  # seconds between two looks at the journal

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the lines go. Made, fed and closed in the thread of its reader."""

    def write(self, step: int, when: float, values: Mapping[str, float], note: str | None) -> None:
        """A line: numbers by name, or words."""
        ...

    def close(self, status: str) -> None:
        """Bring all lines to the disk or the server."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder."""

    def __init__(self, output_dir: Path, run_name: str, project: str, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(output_dir / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(output_dir / "tensorboard"))
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def write(self, step: int, when: float, values: Mapping[str, float], note: str | None) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key if "/" in key else f"train/{key}", value, step, walltime=when)
        if note is not None:
            self.writer.add_text(NOTE, note, step, walltime=when)

    def close(self, status: str) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, by its own settings (WANDB_MODE, WANDB_ENTITY, ...); project is the experiment."""

    def __init__(self, output_dir: Path, run_name: str, project: str, config: Mapping[str, Any]):
        import wandb

        self.file = output_dir / "wandb.json"
        try:
            self.known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            self.known = {"id": uuid.uuid4().hex[:12], "last_step": -1}
        self.run = wandb.init(
            project=project,
            name=run_name,
            id=self.known["id"],
            resume="allow",
            dir=str(output_dir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.before = self.known["last_step"]  # sent by the run that is resumed

    def write(self, step: int, when: float, values: Mapping[str, float], note: str | None) -> None:
        if step <= self.before:
            return
        if values:
            self.run.log({key if "/" in key else f"train/{key}": value for key, value in values.items()}, step=step)
        if note is not None:
            self.run.summary[f"{NOTE}.step-{step}"] = note
        if step > self.known["last_step"]:
            self.known["last_step"] = step
            self.file.write_text(json.dumps(self.known))

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)


SINKS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Reader:
    """Follows a journal for one tracker. ``start`` returns at once, ``close`` in time."""

    def __init__(self, name: str, output_dir: Path, run_name: str, project: str, config: Mapping[str, Any]):
        self.name, self.journal, self.error = name, output_dir / FILE, None
        self._arguments = (output_dir, run_name, project, config)
        self._position, self._status = 0, "FAILED"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"mlflow-like {name}", daemon=True)

    error: Exception | None

    def start(self) -> None:
        """Begin to read in the background."""
        self._thread.start()

    def close(self, status: str, *, timeout: float) -> bool:
        """The rest of the journal; whether all arrived within ``timeout`` seconds."""
        self._status = status
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.error = self.error or TimeoutError(f"no answer within {timeout:.0f} s (--tracking_timeout)")
        return self.error is None

    def _follow(self) -> None:
        """Whatever a tracker does wrong, the run goes on, and the journal has it all."""
        try:
            sink: Sink = SINKS[self.name](*self._arguments)
            while not self._stop.wait(INTERVAL):
                self._read(sink)
            self._read(sink)
            sink.close(self._status)
        except Exception as error:
            self.error = error
            log.warning("%s takes nothing more of this run (%s); training goes on", self.name, untold(error))

    def _read(self, sink: Sink) -> None:
        if not self.journal.exists():
            return
        with self.journal.open("rb") as file:
            file.seek(self._position)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._position += len(raw)
                if (line := parsed(raw)) is not None:
                    step, when, note = line.pop("step"), line.pop("time"), line.pop(NOTE, None)
                    sink.write(step, when, {key: value for key, value in line.items() if value is not None}, note)
