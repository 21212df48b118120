"""Where a run happens: its processes and its folder, and how it talks to the user."""

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdpo.config import RunConfig
from diffdpo.engine.choice import PLAIN, engine_kind
from diffdpo.engine.world import TIMEOUT, World, init_distributed
from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu
from diffdpo.memory.allocator import keep_freed_memory
from diffdpo.setup.publish import check_hub
from diffdpo.setup.shared_folder import check_seen_by_all
from diffdpo.tracking.run import tracking_uri

MEETINGS = 5  # times --hang_timeout that processes may take to meet


@dataclass(frozen=True)
class RunContext:
    """The processes of a run, its name and its folders."""

    world: World
    output_dir: Path
    cache_dir: Path
    run_name: str

    def print(self, text: str) -> None:
        """Tell the user, once."""
        if self.world.is_main:
            print(text, flush=True)


def open_context(config: RunConfig, command: str) -> RunContext:
    """Join the other processes and agree on a name and a folder. UserError when the folder holds another run."""
    _set_threads()
    # processes start apart: a container is fetched, torch is read from a slow disk
    patience = MEETINGS * config.hang_timeout or TIMEOUT.total_seconds()
    world = init_distributed(always_distributed=engine_kind(config) != PLAIN, patience=patience, watched=True)
    if not is_gpu(world.device):
        keep_freed_memory()
    name = world.broadcast(config.run_name or _new_name(command, Path("outputs")))
    output_dir = Path(config.output_dir or Path("outputs") / name).resolve()
    # a replay reads what is there and writes nothing
    _check_output_dir(output_dir, "latest" if config.replay else config.resume_from_checkpoint)
    tracking_uri(config.tracking_uri, output_dir)  # a wrong one is refused here, before a model is loaded
    check_hub(config, world)
    world.barrier()  # no rank may write there before all have looked
    check_seen_by_all(output_dir, world)
    cache_dir = Path(config.data_cache_dir) if config.data_cache_dir else output_dir.parent / "data_cache"
    return RunContext(world, output_dir, cache_dir, name)


def _new_name(command: str, outputs: Path) -> str:
    """A name by the clock, with a number after it where a run began in the same second."""
    now = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (outputs / name).exists())


def _check_output_dir(output_dir: Path, resume: str | None) -> None:
    """The folder is made when the run's record begins: a mistake met before leaves nothing behind."""
    if (output_dir / "metrics.jsonl").exists():
        if not resume:
            raise UserError(
                f"--output_dir {output_dir} holds a run already; give another, or "
                "--resume_from_checkpoint latest to go on"
            )
        if resume not in ("latest", "auto") and output_dir not in Path(resume).resolve().parents:
            raise UserError(
                f"--output_dir {output_dir} holds a run already and --resume_from_checkpoint {resume} is of another; "
                "give a new --output_dir, or that run's"
            )
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "is not writable" if existing.is_dir() else "is not a folder"
        raise UserError(f"--output_dir {output_dir} cannot be made: {existing} {why}; give another")


def _set_threads() -> None:
    """Several processes share the cores of a host; each taking all of them makes every one crawl."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    # torchrun sets 1 where the user says nothing, and Adam on the host would run on one core
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_torchrun or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
