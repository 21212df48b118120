"""The processes of a run know one another without a collective: who they are, who has gone, who cannot be reached.

They meet at the launcher's store, where each says its host, its process and a port. An elastic launcher keeps that
store from one attempt to the next, and its hosts do not count attempts alike: so rank 0 names each meeting anew and
closes it with the list of who is there, and who is not on the list waits for the next. Nothing is said on a port: the
kernel takes a connection while the process is there, frozen or not, refuses it when the process has gone, and nobody
answers where the link is cut. So a loss is noticed within seconds, also while gloo or NCCL waits for it.
"""

import errno
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

from diffdpo.errors import TrainingError, UserError

LOOK_SECONDS = 3.0  # between looks at the others; two refusals in a row are a loss
PROBE_SECONDS = 3.0
FEW = 16  # of so many processes each looks at all, else at the next one
LOOK_TURNS = 4  # of half a second, before all have come
ATTEMPT = "DIFFDPO_ATTEMPT"  # in the environment: which start of the same command this is
MEETING = "diffdpo-meeting"
REACHED, GONE, UNREACHED = "reached", "gone", "unreached"


@dataclass(frozen=True)
class Member:
    """A process of the run, and where its kernel answers."""

    rank: int
    host: str
    pid: int
    address: str
    port: int
    local_rank: int = 0  # on its host
    token: str = ""  # of this process and no other

    def describe(self) -> str:
        """Who and where, for the user."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    def probe(self, seconds: float = PROBE_SECONDS) -> str:
        """``reached``, ``gone`` or ``unreached``."""
        here = self.host == socket.gethostname()
        address = os.environ["MASTER_ADDR"] if self.address.startswith("127.") and not here else self.address
        try:
            socket.create_connection((address, self.port), timeout=seconds).close()
            return REACHED
        except OSError as error:
            return GONE if error.errno == errno.ECONNREFUSED else UNREACHED


@dataclass
class Companions:
    """The other processes, watched by a thread. ``where``: what a rank was doing, if that is known."""

    rank: int
    members: Sequence[Member]
    door: socket.socket
    where: Callable[[int], str] = lambda rank: ""
    store: dist.Store | None = None  # where they have met
    ended: threading.Event = field(default_factory=threading.Event)
    refused: dict[int, int] = field(default_factory=dict)  # rank -> looks in a row
    last_reached: dict[int, float] = field(default_factory=dict)

    def tell(self, key: str, text: str) -> None:
        """Leave words at the store, in the place of earlier ones."""
        if self.store is not None:
            self.store.set(key, text)

    def heard(self, key: str) -> str | None:
        """The newest words under a key; None where nobody has left any. Waits for nobody."""
        return self.store.get(key).decode() if self.store is not None and self.store.check([key]) else None

    def start(self) -> None:
        """Watch them until ``ended`` is set."""
        threading.Thread(target=self._watch, name="companions", daemon=True).start()

    def others(self) -> list[Member]:
        """The companions this process looks at: all, or of many the next one."""
        others = [member for member in self.members if member.rank != self.rank]
        return others if len(others) < FEW else [min(others, key=lambda m: (m.rank - self.rank) % len(self.members))]

    def unreached_for(self) -> dict[int, float]:
        """Seconds since a rank that was once reached has answered; those that answer are left out."""
        now = time.monotonic()
        silent = {rank: now - last for rank, last in self.last_reached.items()}
        return {rank: seconds for rank, seconds in silent.items() if seconds > 2 * (LOOK_SECONDS + PROBE_SECONDS)}

    def look(self) -> list[Member]:
        """Probe the others once; those that have gone for good."""
        gone = []
        for member in self.others():
            answer = member.probe()
            self.refused[member.rank] = self.refused.get(member.rank, 0) + 1 if answer == GONE else 0
            if answer == REACHED:
                self.last_reached[member.rank] = time.monotonic()
            if self.refused[member.rank] >= 2:
                gone.append(member)
        return gone

    def _watch(self) -> None:
        self.look()  # what answers now and not later has been cut off
        while not self.ended.wait(LOOK_SECONDS):
            drain(self.door)
            gone = self.look()
            if gone and not self.ended.wait(LOOK_SECONDS if self.rank else 0.0):
                self._end(gone)  # the main thread has had its time: it waits for one who does not come

    def _end(self, gone: Sequence[Member]) -> None:
        told = " and ".join(f"{member.describe()} has gone{self.where(member.rank)}" for member in gone)
        print(
            f"\nerror: {told}; its own output says why, or it was killed; go on with --resume_from_checkpoint latest",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def drain(door: socket.socket) -> None:
    """Take and drop what knocked, or the kernel's queue would be full one day."""
    try:
        while True:
            door.accept()[0].close()
    except BlockingIOError:
        return


def open_door(towards: str, port: int) -> tuple[socket.socket, str]:
    """(a port that answers, the address of this host as seen on the way to another)."""
    family, kind, _, _, place = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(place)  # sends nothing
        address = way.getsockname()[0]
    door = socket.create_server(("", 0), family=family, backlog=512)
    door.setblocking(False)
    return door, address


def meet(rank: int, size: int, patience: float) -> tuple[dist.Store, Companions]:
    """Wait for all processes at the launcher's store, at most so many seconds. TrainingError naming who has not come,
    or has gone meanwhile; UserError where the launcher tells no port."""
    if not os.environ["MASTER_PORT"].isdecimal() or int(os.environ["MASTER_PORT"]) == 0:
        # torchrun --master_port 0 serves at a port that it does not tell: its processes would look for it for ever
        raise UserError(
            f"MASTER_PORT is {os.environ['MASTER_PORT']!r}, where no process can meet another; on one host use "
            "torchrun --standalone, which finds a free port, else give a port that is free on the first host"
        )
    until = time.monotonic() + patience
    store = _store(rank, size, patience)
    door, address = open_door(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    place, local_rank = (address, door.getsockname()[1]), int(os.environ.get("LOCAL_RANK", 0))
    me = Member(rank, socket.gethostname(), os.getpid(), *place, local_rank, uuid.uuid4().hex)
    if rank == 0:
        store.set(MEETING, me.token)
    waiting = Companions(rank, (), door)
    for turn in itertools.count():
        meeting = _Meeting(store, size)
        if members := meeting.attended_by(me):
            return meeting.store, Companions(rank, members, door, store=meeting.store)
        time.sleep(min(0.01 * 2**turn, 0.5))
        if turn % LOOK_TURNS == 0 or time.monotonic() > until:
            _check_meeting(meeting, waiting, patience if time.monotonic() > until else None)
    raise AssertionError("unreachable")


class _Meeting:
    """The one that rank 0 has named last; its ``store`` is no other meeting's."""

    def __init__(self, store: dist.Store, size: int):
        self.names = [f"member-{number}" for number in range(size)]
        self.name = store.get(MEETING).decode() if store.check([MEETING]) else ""
        self.store = dist.PrefixStore(f"diffdpo-{self.name}", store)

    def here(self) -> list[Member]:
        """Who has come so far."""
        came = [name for name in self.names if self.name and self.store.check([name])]
        return [Member(**json.loads(self.store.get(name))) for name in came]

    def attended_by(self, me: Member) -> list[Member]:
        """Come to it; all members where rank 0 has closed it with ``me`` among them, nobody before that."""
        if not self.name:
            return []
        own = self.names[me.rank]
        if not self.store.check([own]) or json.loads(self.store.get(own))["token"] != me.token:
            self.store.set(own, json.dumps(asdict(me)))
        if me.rank == 0 and len(here := self.here()) == len(self.names):
            self.store.set("closed", json.dumps([asdict(member) for member in here]))
        closed = json.loads(self.store.get("closed")) if self.store.check(["closed"]) else []
        return [Member(**told) for told in closed] if any(told["token"] == me.token for told in closed) else []


def _store(rank: int, size: int, patience: float) -> dist.Store:
    """As torch's own env:// makes it, but nobody waits in it."""
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves, seconds = rank == 0 and not by_launcher, timedelta(seconds=patience)
    try:
        return dist.TCPStore(place, port, size, serves, seconds, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise
        raise TrainingError(
            f"rank {rank} on {socket.gethostname()} has waited {patience:.0f} s to meet the other processes at "
            f"{place}:{port}, where nobody answers; see whether rank 0 has started and its host can be reached"
        ) from None


def _check_meeting(meeting: _Meeting, waiting: Companions, waited: float | None) -> None:
    """TrainingError where one who came has gone, or where the time is over."""
    drain(waiting.door)
    waiting.members, names = meeting.here(), meeting.names
    # of an earlier attempt all are meant to have gone, rank 0 too
    called = any(member.rank == 0 and member.probe() == REACHED for member in waiting.members)
    if called and (gone := waiting.look()):
        raise TrainingError(f"{gone[0].describe()} has gone before all {len(names)} processes had met")
    if waited is not None:
        here = {member.rank for member in waiting.members}
        missing = [number for number in range(len(names)) if number not in here]
        told = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        raise TrainingError(
            f"rank {told} of {len(names)} has not come within {waited:.0f} s; see whether it has started, and its own "
            "output"
        )
