"""What came of each cell, on disk: a sweep that is started again, after whatever end, knows where it was."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.files import write_whole
from diffdpo.errors import RESUMABLE, UserError
from diffdpo.sweep.grid import Cell

FOLDER = ".sweep"  # of logs and states, in the sweep's


@dataclass(frozen=True)
class State:
    """``exit_code``: None while it runs, and for ever where the sweep was killed meanwhile."""

    flags: str
    exit_code: int | None = None
    tries: int = 0
    seconds: float = 0.0

    @property
    def word(self) -> str:
        """finished, failed, or to do: new, killed, or stopped in a way that can be resumed."""
        if self.exit_code == 0:
            return "finished"
        return "to do" if self.exit_code in (None, RESUMABLE, 130) or self.exit_code < 0 else "failed"


def state_file(folder: Path, cell: Cell) -> Path:
    """Where a cell's state is."""
    return folder / FOLDER / f"{cell.name}.json"


def log_file(folder: Path, cell: Cell) -> Path:
    """Where what a cell prints goes."""
    return folder / FOLDER / f"{cell.name}.log"


def read_state(folder: Path, cell: Cell) -> State:
    """What is known of a cell. UserError where its folder is that of other flags: two runs would become one."""
    flags = shlex.join(cell.words())
    try:
        state = State(**json.loads(state_file(folder, cell).read_text()))
    except (OSError, ValueError, TypeError):
        return State(flags)
    if state.flags != flags:
        raise UserError(
            f"{folder / cell.name} was begun with other flags ({state.flags}); give the sweep another --output_dir, or "
            "remove that folder"
        )
    return state


def write_state(folder: Path, cell: Cell, state: State) -> None:
    """Keep it; whole at any time."""
    path = state_file(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(state)).encode())
