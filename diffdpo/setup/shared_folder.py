"""Is a run's folder the same on all hosts? Checkpoints are written and looked at by all processes together."""

import os
import socket
import time
import uuid
from pathlib import Path

from diffdpo.engine.world import World
from diffdpo.errors import UserError

PATIENCE = 10.0  # seconds a shared file system may take to show a new file


def check_seen_by_all(output_dir: Path, world: World) -> None:
    """UserError, on every rank, where one does not see what rank 0 writes where the folder is, or will be. Only asked
    where there are several hosts. Nothing is left behind; every rank calls."""
    if world.size == int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size):
        return
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    probe = Path(world.broadcast(str(existing / f".seen-by-all-{uuid.uuid4().hex}")))
    if world.is_main:
        probe.touch()
    world.barrier()
    blind = [name for name in world.all_gather_object("" if _appears(probe) else socket.gethostname()) if name]
    if world.is_main:
        probe.unlink()
    if blind:
        raise UserError(
            f"--output_dir {output_dir} is not the same folder on all hosts: {blind[0]} does not see what rank 0 "
            "writes, and checkpoints are written by all together; name a folder on a disk that they share"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
