"""The processes of a run: which one this is, and the few things they say to each other.

A launcher (deepspeed, torchrun) tells the rank through the environment; without one there is one process.
"""

import atexit
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffdpo.engine.clock import Clock, count_waits
from diffdpo.engine.companions import Companions, meet
from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu, kind_of

TIMEOUT = timedelta(minutes=30)
MEETING_SECONDS = 600.0  # that processes may start apart


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes, ``local_rank`` on its host, and the device this process computes on.

    ``group``: a torch process group to talk in, by default the one of all. ``companions``: None for one process.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    group: Any = field(default=None, compare=False, repr=False)
    companions: Companions | None = field(default=None, compare=False, repr=False)
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)  # where this process spends a step

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank. The argument is left as it is."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def all_reduce_sums(self, numbers: Sequence[int]) -> list[int]:
        """The sums of a list of whole numbers over all ranks, on every rank."""
        return [int(n) for n in self.all_reduce_sum(torch.tensor(list(numbers), dtype=torch.int64, device=self.device))]

    def all_reduce_max(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        if self.size == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
        return int(box)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks (of one shape), end to end in rank order, on every rank."""
        if self.size == 1:
            return tensor
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.cat(pieces)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device, group=self.group)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def beside(self) -> "World":
        """A world of these processes for a thread: it talks apart from the steps, through the host. All ranks call."""
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None
        return replace(self, group=group, device=torch.device("cpu"))


_watching: list[Companions] = []  # of this process


def init_distributed(
    *, always_distributed: bool = False, patience: float = MEETING_SECONDS, watched: bool = False
) -> World:
    """Read the launcher's environment, pick the device and, with several processes, join the process group, waiting at
    most ``patience`` seconds for the others. ``watched``: end this process when another goes, until ``part`` is called.

    ``always_distributed`` fills in the environment of a single process started by plain ``python``, which DeepSpeed
    needs (it looks for MPI otherwise). UserError when the port that several processes meet at is taken or not told,
    TrainingError when one does not come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # or long sums are rounded on the way
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns of what was just found out
    if always_distributed and size == 1 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        # nobody else has to find the port, so the launcher's fixed one, which another run may hold, need not be used
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    companions = None
    if size > 1 and not dist.is_initialized():
        try:
            store, companions = meet(rank, size, patience)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {os.environ['MASTER_PORT']} is taken, perhaps by another run on this host; give the launcher "
                "(deepspeed or torchrun) another one with --master_port"
            ) from None
        if watched:
            _watching.append(companions)
            companions.start()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        atexit.unregister(let_threads_finish)
        atexit.register(let_threads_finish)
    clock = Clock(kind_of(device).timed_event if is_gpu(device) else None)
    if size > 1:
        count_waits(clock)
    return World(rank, local_rank, size, device, companions=companions, clock=clock)


def part() -> None:
    """From here on each process ends by itself."""
    while _watching:
        _watching.pop().ended.set()


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    part()
    if dist.is_available() and dist.is_initialized():
        count_waits(None)
        dist.destroy_process_group()


def let_threads_finish(seconds: float = 2.0) -> None:
    """Wait at most ``seconds`` until no other thread of this process computes.

    A thread of gloo frees a collective's tensors after those who waited for it have gone on. Freeing them needs the
    interpreter, and where that has begun to end, the whole process is aborted ("terminate called without an active
    exception", status 134) after all its work is done. DeepSpeed keeps groups beyond their destruction, so their
    threads cannot be joined. Where the system has no /proc this only gives them a moment.
    """
    mine, until = str(threading.get_native_id()), time.monotonic() + seconds
    time.sleep(0.01)  # which lets go of the interpreter: who waits for it goes on
    while time.monotonic() < until and any(
        _runs(task) for task in Path("/proc/self/task").glob("*") if task.name != mine
    ):
        time.sleep(0.001)


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(") ")[2].startswith("R")
    except OSError:  # it has ended
        return False


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
