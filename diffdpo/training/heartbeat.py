"""Signs of life outside the collectives, so that a run that hangs says who, where and in what.

Each rank's watcher thread notes in ``heartbeats/rank-N.json`` where its main thread is. The thread of a frozen process
is frozen too: its file grows old. One that waits in a collective for another writes on, and says how long it waits.
A hang is a rank without a sign for ``--hang_timeout``, or a stage that takes that much longer than three times its
longest of late: stacks go to ``hang-rank-N.txt``, one rank says what it sees, and all processes end with exit code 4.
"""

import faulthandler
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from data_pipeline.files import write_whole
from diffdpo.engine.companions import GONE, Member
from diffdpo.engine.world import World
from diffdpo.errors import HUNG, TrainingError, UserError

FOLDER, SETUP = "heartbeats", "setup"
PAUSE_SECONDS, STALE_SECONDS = 1.0, 10.0
LOOK_TURNS = 5  # seconds between looks at the others
LATELY = 20  # times of a stage that are remembered: the first step may compile for minutes
WAITING = "an exchange with the others"
STAGES = (  # a file's place and function to what is being done there, the innermost first
    ("engine/world.py", "", WAITING),
    ("engine/", "backward", "backward"),
    ("engine/", "step", "optimizer step"),
    ("reference/", "", "reference"),
    ("training/checkpoint.py", "", "save"),
    ("data_pipeline/", "", "data"),
    ("scores/masked_log_probs.py", "", "forward"),
    ("evaluation/", "", "evaluation"),
    ("tracking/", "", "record"),
)


@dataclass(frozen=True)
class Sign:
    """What a rank has last said of itself. ``waited``: seconds in this stage; ``age``: of the sign itself;
    ``unreached``: ranks whose host has not answered it for long."""

    rank: int
    host: str
    pid: int
    stage: str
    step: int
    waited: float
    age: float = 0.0
    unreached: tuple[int, ...] = ()

    def describe(self) -> str:
        """Who and where, for the user."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


@dataclass
class Pulse:
    """Where this process is. The main thread calls ``beat``; a thread of its own watches."""

    world: World
    output_dir: Path
    timeout: float  # 0: nothing is ever a hang
    stage: str = SETUP
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    times: dict[str, deque[float]] = field(default_factory=dict)  # seconds of each stage
    ended: threading.Event = field(default_factory=threading.Event)
    main_thread: int = field(default_factory=threading.get_ident)

    def beat(self, stage: str, step: int) -> None:
        """A stage has begun; the one before has taken its time."""
        now = time.monotonic()
        self.times.setdefault(self.stage, deque(maxlen=LATELY)).append(now - self.since)
        self.stage, self.step, self.since = stage, step, now

    def limit(self) -> float:
        """Seconds this stage may take: infinite while its usual time is not known."""
        return self.timeout + 3 * max(self.times[self.stage]) if self.stage in self.times else float("inf")

    def is_late(self) -> bool:
        """Whether this rank has been in its stage for too long."""
        return time.monotonic() - self.since > self.limit()

    def hears_nothing(self) -> bool:
        """Whether another rank has given no sign for too long."""
        return self.world.size > 1 and any(sign.age > self.timeout for sign in read_signs(self.output_dir))

    def unreached(self) -> dict[int, float]:
        """Ranks that could be reached once and cannot any more, and for how many seconds."""
        return self.world.companions.unreached_for() if self.world.companions is not None else {}

    def sign(self) -> Sign:
        """The sign of this rank, now."""
        waited, stage = time.monotonic() - self.since, stage_of(self.main_thread) or self.stage
        place = (self.world.rank, socket.gethostname(), os.getpid())
        return Sign(*place, stage, self.step, waited, unreached=tuple(self.unreached()))

    def is_cut_off(self) -> bool:
        """Whether another rank has not been reached for too long."""
        return any(seconds > self.timeout for seconds in self.unreached().values())

    def watch(self) -> None:
        """Look at all signs until ended, in a thread of its own."""
        for turn in itertools.count():
            if self.ended.wait(PAUSE_SECONDS):
                return
            if self.stage == SETUP:  # a mistake met there leaves nothing behind
                continue
            if self.world.size > 1:
                with suppress(OSError):  # a full disk is another's matter
                    self._write(self.sign())
            # all ranks read the signs of all: not every second
            look = turn % LOOK_TURNS == 0
            if self.timeout and (self.is_late() or (look and (self.is_cut_off() or self.hears_nothing()))):
                self.end_hung()

    def members(self) -> Sequence[Member]:
        """The processes as they met; none where there is one."""
        return self.world.companions.members if self.world.companions is not None else ()

    def where(self, rank: int) -> str:
        """What a rank was doing when it last said so, in words."""
        signs = [sign for sign in read_signs(self.output_dir) if sign.rank == rank]
        return f" in {signs[0].stage} of step {signs[0].step}" if signs else ""

    def _write(self, sign: Sign) -> None:
        path = self.output_dir / FOLDER / f"rank-{sign.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(sign)).encode(), forced=False)

    def end_hung(self) -> None:
        """Dump the stacks; one of the living says what is wrong; end frozen processes of this host, and this one."""
        with suppress(OSError), (self.output_dir / f"hang-rank-{self.world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # its own sign as it is now, and those of others where they share the folder
        signs = [sign for sign in read_signs(self.output_dir) if sign.rank != self.world.rank] + [self.sign()]
        signs.sort(key=lambda sign: sign.rank)
        living = [sign for sign in signs if sign.age < STALE_SECONDS] or signs
        if living[0].rank == self.world.rank:
            line = f"error: {diagnosis(signs, self.members())}; stacks: {self.output_dir}/hang-rank-*.txt"
            print(f"\n{line}", file=sys.stderr, flush=True)  # not behind the progress bar
        else:
            time.sleep(3 * PAUSE_SECONDS)  # the launcher ends all of them when the first has ended
        for sign in signs:
            if sign not in living and sign.host == socket.gethostname() and _is_ours(sign.pid):
                os.kill(sign.pid, signal.SIGKILL)
        os._exit(HUNG)


@contextmanager
def beating(pulse: Pulse) -> Iterator[Pulse]:
    """The pulse is watched inside, and where a rank has died its name is told instead of a backend's traceback."""
    folder = pulse.output_dir / FOLDER
    if pulse.world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if pulse.world.companions is not None:
        pulse.world.companions.where = pulse.where
    thread = threading.Thread(target=pulse.watch, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield pulse
        with suppress(OSError):  # where a run breaks off its signs stay, for the others to read
            (folder / f"rank-{pulse.world.rank}.json").unlink()
            folder.rmdir()
    except (UserError, TrainingError):
        raise
    except RuntimeError as error:  # what torch.distributed raises when another process has gone
        told = [
            f"{sign.describe()} ended in {sign.stage} of step {sign.step}"
            for sign in lost(read_signs(pulse.output_dir))
        ]
        told = told or [f"{member.describe()} ended" for member in pulse.members() if member.probe() == GONE]
        if pulse.world.size > 1 and told:
            print(file=sys.stderr)  # behind the progress bar of who is gone
            raise TrainingError(
                f"{' and '.join(told)}; its own output says why, or it was killed; go on with "
                "--resume_from_checkpoint latest"
            ) from error
        raise
    finally:
        pulse.ended.set()
        thread.join()


def read_signs(output_dir: Path) -> list[Sign]:
    """The newest sign of every rank that has given one, in rank order."""
    signs = []
    for path in (output_dir / FOLDER).glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):  # just being replaced
            told = json.loads(path.read_text())
            age = max(0.0, time.time() - path.stat().st_mtime)
            signs.append(Sign(**told | {"age": age, "unreached": tuple(told["unreached"])}))
    return sorted(signs, key=lambda sign: sign.rank)


def lost(signs: Sequence[Sign]) -> list[Sign]:
    """Ranks whose process is there no more: on this host by its number, elsewhere by its silence."""
    here = socket.gethostname()
    return [s for s in signs if (not _is_ours(s.pid) if s.host == here else s.age > STALE_SECONDS)]


def _is_ours(pid: int) -> bool:
    """Whether a process of this command has the number."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.exe() == psutil.Process().exe()
    return False


def diagnosis(signs: Sequence[Sign], members: Sequence[Member] = ()) -> str:
    """Who holds the others up, as far as the signs tell."""
    waited = max(sign.waited for sign in signs)
    if cut := [(sign, rank) for sign in signs for rank in sign.unreached]:
        names = {member.rank: member.describe() for member in members}
        sign, other = cut[0]
        return (
            f"hung: {sign.describe()} cannot reach {names.get(other, f'rank {other}')} any more; it is in "
            f"{sign.stage} of step {sign.step}: the link between their hosts is cut, or the other host is down"
        )
    if silent := [sign for sign in signs if sign.age > STALE_SECONDS]:
        first = silent[0]
        return (
            f"hung: {first.describe()} has shown no life for {first.age:.0f} s; it was in {first.stage} of step "
            f"{first.step} (frozen, killed, or its host is cut off)"
        )
    if len(signs) == 1:
        return f"hung: {signs[0].describe()} has been in {signs[0].stage} of step {signs[0].step} for {waited:.0f} s"
    behind = min(sign.step for sign in signs)
    late = [sign for sign in signs if sign.step == behind]
    late = [s for s in late if s.stage == "data"] or [s for s in late if s.stage != WAITING] or late
    if len(late) < len(signs):
        return f"hung: {late[0].describe()} has been in {late[0].stage} of step {behind} for {late[0].waited:.0f} s"
    stages = ", ".join(f"rank {sign.rank} on {sign.host}: {sign.stage}" for sign in signs[:8])
    return (
        f"hung: all {len(signs)} ranks live and wait for one another for {waited:.0f} s in step {behind} ({stages}); "
        "look at the links between their hosts"
    )


def stage_of(thread: int) -> str | None:
    """What a thread is doing, by the innermost of our functions on its stack; None where no more is known than that it
    is in a step."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        place, name = frame.f_code.co_filename, frame.f_code.co_name
        if place.endswith("training/loop.py"):  # what lies further out is not of this stage
            return None
        for part, function, stage in STAGES:
            if part in place and ("diffdpo" in place or "data_pipeline" in place) and function in ("", name):
                return stage
        frame = frame.f_back
    return None
