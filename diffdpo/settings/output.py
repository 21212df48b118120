"""How long a run takes, where it writes, and what it keeps."""

from dataclasses import dataclass
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
        "steps between checkpoints, or their share of all; 0: the final model only",
        at_least=0,
        share=True,
        common=True,
    )
    save_total_limit: int = setting(2, "newest checkpoints to keep", at_least=1)
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint folder, or 'latest' of --output_dir; default: a new run", common=True
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
        if self.resume_from_checkpoint == "latest" and not self.output_dir:
            raise UserError("--resume_from_checkpoint latest needs --output_dir, the folder of the run to go on with")
