"""Checkpoints: everything a run needs to go on as if it had not stopped.

``checkpoints/step-N/`` holds the engine's state and ``run.json`` (step, position in the data). It is written beside and
renamed when complete, so a folder of that name is always whole. Noise, data order and learning rate are functions of
the seed and the step, so there is no generator state to keep.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffdpo.engine.base import Engine
from diffdpo.errors import TrainingError, UserError

FOLDER, STATE = "checkpoints", "run.json"
NEEDED = ("step", "loader", "before", "config", "held_by")
NAME = re.compile(r"step-(\d+)")


def save_checkpoint(output_dir: Path, step: int, engine: Engine, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``checkpoints/step-N``, then drop all but the ``keep`` newest. Every rank calls."""
    final = output_dir / FOLDER / f"step-{step}"
    partial = final.with_name(final.name + ".partial")
    if engine.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.world.barrier()
    with told_if_unwritable(partial):
        engine.save(partial)
    engine.world.barrier()
    if engine.world.is_main:
        with told_if_unwritable(partial):
            (partial / STATE).write_text(json.dumps(state, indent=1))
            _sync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    engine.world.barrier()
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in (output_dir / FOLDER).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((p for p in found if (p / STATE).exists()), key=_step_of)


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after ``step`` to ``step-N.aside``: a run that goes on from ``step`` has given them up, and
    they must be neither 'latest' nor counted among those to keep. The new names."""
    renamed = []
    for path in list_checkpoints(output_dir):
        if _step_of(path) > step:
            aside = path.with_name(path.name + ".aside")
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(path.rename(aside))
    return renamed


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


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
    """``run.json`` of a checkpoint. UserError when it is damaged or of another version."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {**state, **{key: state[key] for key in NEEDED}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint / STATE} is damaged or of another version ({error!r}); resume from another checkpoint"
        ) from None


@contextmanager
def told_if_unreadable(checkpoint: Path) -> Iterator[None]:
    """A damaged file of the engine's, which torch tells of in many ways, as one line."""
    try:
        yield
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0][:150]
        raise UserError(f"{checkpoint} cannot be read ({reason}); resume from another checkpoint") from error


@contextmanager
def told_if_unwritable(folder: Path) -> Iterator[None]:
    """A full disk, which torch and safetensors tell of in their own ways, as one line that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0][:150]
        raise TrainingError(
            f"{folder} cannot be written ({reason}); free some space and go on from the newest checkpoint with "
            "--resume_from_checkpoint latest"
        ) from error


def _sync_tree(folder: Path) -> None:
    """Have the files survive a power cut before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
