"""How long a run takes, where it writes, and what it keeps."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """How long a run takes, where it writes, and what it keeps."""

    title: ClassVar[str] = "run and output"

    output_dir: str | None = setting(None, "folder of the run; default: outputs/<run_name>", common=True)
    run_name: str | None = setting(None, "default: the command and the time")
    max_steps: int = setting(-1, "optimizer steps; -1: --num_train_epochs decides", common=True)
    num_train_epochs: float = setting(1.0, "passes over the training data", common=True)
    logging_steps: int | float = setting(
        1, "steps between lines of metrics.jsonl, or their share of all", above=0, share=True
    )
    save_steps: int | float = setting(
        0,
        "steps between checkpoints, or their share of all; 0: --save_minutes decides",
        at_least=0,
        share=True,
        common=True,
    )
    save_minutes: float = setting(30.0, "minutes between checkpoints; 0: --save_steps alone decides", at_least=0)
    save_total_limit: int = setting(2, "newest checkpoints to keep", at_least=1)
    save_on_full_disk: str = setting(
        "stop", "continue: train on without the checkpoints that find no room", choices=("stop", "continue")
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "a checkpoint, 'latest' of --output_dir, or 'auto': latest or a new run; default: a new run",
        common=True,
    )
    max_restarts: int = setting(
        0, "times the command starts itself again, from the newest checkpoint, when it ends by a fault", at_least=0
    )
    replay: str | None = setting(
        None,
        "a culprit-step-N.json whose step is taken again, record by record; default: none, a run trains",
        common=False,
    )
    on_nonfinite: str = setting(
        "stop",
        "at a loss or gradient that is not finite; skip: leave the step out, at most --nonfinite_limit in all",
        choices=("stop", "skip"),
    )
    nonfinite_limit: int = setting(10, "steps that --on_nonfinite skip may leave out", at_least=1)
    stop_seconds: float = setting(10.0, "seconds in which a run that is sent SIGTERM ends", at_least=2)
    hang_timeout: float = setting(
        120.0,
        "seconds beyond its usual time after which a step, or a silent rank, is taken to hang; 0: never",
        at_least=0,
    )

    def check(self) -> None:
        """A run has a length, a name that is no folder, and a place to be resumed from."""
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps is {self.max_steps}; give 1 or more, or -1 to train --num_train_epochs")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise UserError(
                f"--num_train_epochs is {self.num_train_epochs}; it must be above 0 when --max_steps is not set"
            )
        if self.run_name is not None and (not self.run_name.strip() or "/" in self.run_name):
            raise UserError(
                f"--run_name {self.run_name!r} names a folder; give a name without '/', or use --output_dir"
            )
        if self.max_restarts and not self.output_dir:
            raise UserError("--max_restarts needs --output_dir, the folder in which a restarted run goes on")
        if self.replay is not None and not Path(self.replay).is_file():
            raise UserError(f"--replay {self.replay}: there is no such file; a run that stops at one writes it")
        if self.resume_from_checkpoint in ("latest", "auto") and not self.output_dir:
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint} needs --output_dir, the folder of the run "
                "to go on with"
            )
