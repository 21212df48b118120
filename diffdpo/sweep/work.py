"""The cells of a sweep as processes, N at a time. None outlives the sweep: it is told to stop when the sweep dies."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffdpo.errors import UserError
from diffdpo.settings.credentials import hidden
from diffdpo.sweep.grid import Cell, Grid
from diffdpo.sweep.states import State, log_file, read_state, write_state
from diffdpo.tracking.lock import is_held

PAUSE = 0.2
PR_SET_PDEATHSIG = 1
Say = Callable[[str], None]


@dataclass
class Running:
    """A cell that runs."""

    cell: Cell
    state: State
    process: subprocess.Popen
    slot: int
    started: float


class Work:
    """``launcher``: words before the command, such as torchrun's; ``extra``: further flags of every cell."""

    def __init__(self, grid: Grid, folder: Path, *, jobs: int, launcher: Sequence[str], extra: Sequence[str], say: Say):
        self.grid, self.folder, self.jobs, self.say = grid, folder, jobs, say
        self.launcher, self.extra = list(launcher), list(extra)
        self.stopping = False
        self.running: list[Running] = []

    def run(self, cells: Iterable[Cell], ended: Callable[[Cell, State], None] | None = None) -> None:
        """All of them, in order, to their ends; until a signal asks to stop, which the cells are told. The next cell is
        asked for when there is a place for it; ``ended`` hears of each. A UserError of either stops the cells too."""
        with _told_of_signals(self._stop):
            try:
                self._run(iter(cells), ended)
            except UserError:
                self._stop()
                while self.running:
                    time.sleep(PAUSE)
                    self._take_ended()
                raise

    def _run(self, waiting: Iterator[Cell], ended: Callable[[Cell, State], None] | None) -> None:
        more = True
        while self.running or (more and not self.stopping):
            while more and len(self.running) < self.jobs and not self.stopping:
                cell = next(waiting, None)
                more = cell is not None
                if cell is not None:
                    self._start(cell)
            time.sleep(PAUSE)
            for cell, state in self._take_ended():
                if ended is not None:
                    ended(cell, state)

    def _take_ended(self) -> list[tuple[Cell, State]]:
        """What has ended since the last look; each is told."""
        return [(one.cell, self._ended(one)) for one in [*self.running] if one.process.poll() is not None]

    def _start(self, cell: Cell) -> None:
        output_dir, log = self.folder / cell.name, log_file(self.folder, cell)
        if is_held(output_dir):
            self.say(
                f"{cell.name}: a living run has its folder, of a sweep that was killed perhaps; waiting for its end"
            )
        while is_held(output_dir) and not self.stopping:
            time.sleep(PAUSE)
        state = replace(read_state(self.folder, cell), exit_code=None)
        state = replace(state, tries=state.tries + 1)
        write_state(self.folder, cell, state)
        place = ["--output_dir", str(output_dir), "--run_name", cell.name, "--resume_from_checkpoint", "auto"]
        command = [*self._program(), self.grid.command, *cell.words(), *place, *self.extra]
        slot = next(slot for slot in range(self.jobs) if slot not in [one.slot for one in self.running])
        with log.open("a") as out:
            out.write(f"$ {hidden(' '.join(command))}\n")
            out.flush()
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment_of(slot, self.jobs)},
                start_new_session=True,  # Ctrl-C is told by us, once
                preexec_fn=_die_with_parent,
            )
        self.running.append(Running(cell, state, process, slot, time.monotonic()))
        self.say(f"{cell.name}: started{f', try {state.tries}' if state.tries > 1 else ''}")

    def _program(self) -> list[str]:
        """This interpreter, or the launcher, which starts modules in words of its own."""
        if not self.launcher:
            return [sys.executable, "-m", "diffdpo"]
        return [*self.launcher, "--module" if Path(self.launcher[0]).name == "deepspeed" else "-m", "diffdpo"]

    def _ended(self, one: Running) -> State:
        self.running.remove(one)
        seconds = one.state.seconds + time.monotonic() - one.started
        state = replace(one.state, exit_code=one.process.returncode, seconds=round(seconds, 1))
        write_state(self.folder, one.cell, state)
        if state.word == "finished":
            self.say(f"{one.cell.name}: finished")
        elif state.word == "failed":
            log = log_file(self.folder, one.cell)
            self.say(f"{one.cell.name}: FAILED, exit code {state.exit_code}: {_reason(log)} ({log})")
        else:
            self.say(f"{one.cell.name}: stopped; the same command goes on with it")
        return state

    def _stop(self) -> None:
        self.stopping = True
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)


def environment_of(slot: int, jobs: int) -> Mapping[str, str]:
    """The environment of a run beside others: its share of the cores, and of GPUs where there are as many as runs."""
    if jobs == 1:
        return {}
    devices = _devices()
    own = {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::jobs])} if len(devices) >= jobs else {}
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    return own


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU"))]


def _die_with_parent() -> None:
    """In the child: SIGTERM when the sweep's process goes, be it by kill -9."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reason(log: Path) -> str:
    """The last line that says error, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()]
    return (told or lines or ["it said nothing"])[-1][:300]


class _told_of_signals:
    """SIGTERM, and Ctrl-C, call ``stop`` within."""

    def __init__(self, stop: Callable[[], None]):
        self.stop = stop

    def __enter__(self) -> None:
        kinds = (signal.SIGTERM, signal.SIGINT)
        self.before = {kind: signal.signal(kind, lambda *_: self.stop()) for kind in kinds}

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
