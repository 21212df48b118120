"""Checkpoints: everything a run needs to go on as if it had not stopped.

``checkpoints/step-N/`` holds the engine's state and ``run.json`` (step, position in the data). It is written beside and
renamed when complete, so a folder of that name is always whole. Noise, data order and learning rate are functions of
the seed and the step, so there is no generator state to keep.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from diffdpo.engine.base import Engine
from diffdpo.errors import UserError

FOLDER, STATE = "checkpoints", "run.json"
NAME = re.compile(r"step-(\d+)")


def save_checkpoint(output_dir: Path, step: int, engine: Engine, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``checkpoints/step-N``, then drop all but the ``keep`` newest. Every rank calls."""
    final = output_dir / FOLDER / f"step-{step}"
    partial = final.with_name(final.name + ".partial")
    if engine.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.world.wait()
    engine.save(partial)
    engine.world.wait()
    if engine.world.is_main:
        (partial / STATE).write_text(json.dumps(state, indent=1))
        _sync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    engine.world.wait()
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in (output_dir / FOLDER).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((p for p in found if (p / STATE).exists()), key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The folder ``--resume_from_checkpoint`` means. UserError when there is none."""
    if name == "latest":
        known = list_checkpoints(output_dir)
        if not known:
            raise UserError(f"--resume_from_checkpoint latest: {output_dir}/{FOLDER} holds no checkpoint")
        return known[-1]
    path = Path(name)
    if not (path / STATE).exists():
        raise UserError(f"--resume_from_checkpoint {name} is no checkpoint folder (it has no {STATE})")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``run.json`` of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def _sync_tree(folder: Path) -> None:
    """Have the files survive a power cut before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
