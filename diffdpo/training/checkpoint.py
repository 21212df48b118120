"""Checkpoints: everything a run needs to go on as if it had not stopped.

``checkpoints/step-N/`` holds the engine's state, ``run.json`` (step, position in data and journal) and a manifest of
all of it. It is written beside and renamed when it is on the disk, so a folder of that name has always been whole;
whether it still is, the manifest tells before anything is opened. Noise, data order and learning rate are functions of
the seed and the step, so there is no generator state to keep.
"""

import errno
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffdpo.engine.base import Engine, count_parameters
from diffdpo.engine.choice import DEEPSPEED
from diffdpo.engine.world import World
from diffdpo.errors import TrainingError, UserError
from diffdpo.training.manifest import FileSum, fault_of, publish, sums_of_share, write_manifest

FOLDER, STATE = "checkpoints", "run.json"
NEEDED = ("step", "loader", "before", "config", "held_by")
NAME = re.compile(r"step-(\d+)")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAYS_WRITING = re.compile(
    r"streamwriter|inline_container|unexpected pos|iostream|failed writing|no space left", re.IGNORECASE
)
SAYS_FULL = re.compile(r"no space left|quota exceeded|file too large|failed writing file|unexpected pos", re.IGNORECASE)


class NotSaved(TrainingError):
    """A checkpoint could not be written; nothing of it is left. ``full``: for want of space."""

    def __init__(self, text: str, *, full: bool):
        super().__init__(text)
        self.full = full


def save_checkpoint(output_dir: Path, step: int, engine: Engine, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``checkpoints/step-N``, then drop all but the ``keep`` newest and the best. Every rank calls.

    NotSaved, on every rank, where any of them could not write.
    """
    place = Place(output_dir, step, engine.world, planned_bytes(engine))
    return write_checkpoint(place, engine.save, state, keep=keep)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes, who writes it together, and the bytes that it will take, for who must make room."""

    output_dir: Path
    step: int
    world: World
    planned: int

    @property
    def final(self) -> Path:
        """The folder once it is whole."""
        return self.output_dir / FOLDER / f"step-{self.step}"

    @property
    def partial(self) -> Path:
        """The folder until then."""
        return self.final.with_name(self.final.name + ".partial")


def write_checkpoint(place: Place, write: Callable[[Path], None], state: dict[str, Any], *, keep: int) -> Path:
    """``save_checkpoint`` with ``write`` in the place of the engine's own; every rank of the place's world calls."""
    final, partial, world = place.final, place.partial, place.world
    sums: dict[str, FileSum] = {}

    def begin() -> None:
        for left in final.parent.glob("*.partial") if world.is_main else ():  # of a run that was killed
            shutil.rmtree(left)
        if world.is_main:
            partial.mkdir(parents=True)

    def describe() -> None:
        if world.is_main:
            (partial / STATE).write_text(json.dumps(state, indent=1))

    def end() -> None:
        if world.is_main:
            write_manifest(partial, sums)
            publish(partial, final)

    for work in (begin, lambda: write(partial), describe):
        _on_every_rank(work, place)
    for share in _on_every_rank(lambda: sums_of_share(partial, world), place):
        sums.update(share)
    _on_every_rank(end, place)
    if world.is_main:
        best = (state.get("best") or {}).get("step")  # which the run may go back to
        for old in list_checkpoints(place.output_dir)[:-keep]:  # the newest has just been read back: a sound one stays
            if _step_of(old) != best:
                shutil.rmtree(old)
    world.barrier()
    return final


def _on_every_rank(work: Callable[[], Any], place: Place) -> list[Any]:
    """What ``work`` gives on each rank; where it fails on any, NotSaved on all: none may wait for one that has left."""
    told, result = None, None
    try:
        result = work()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_writing(error):
            raise
        told = (_in_a_line(error), is_full(error))
    for fault, _ in (outcomes := place.world.all_gather_object((told, result))):
        if fault is not None:
            if place.world.is_main:
                shutil.rmtree(place.partial, ignore_errors=True)
            raise NotSaved(_cannot_be_written(place.partial, fault[0], place.planned), full=fault[1])
    return [result for _, result in outcomes]


def planned_bytes(engine: Engine) -> int:
    """What a checkpoint will take on the disk: trained weights and what the optimizer keeps of each."""
    _, trained = count_parameters(engine.module)
    moments = 8
    if engine.choice.on_nvme:  # by name, in fp32
        return trained * (4 + moments)
    if engine.choice.kind == DEEPSPEED:  # it keeps what it computes with beside the fp32 masters
        return trained * (4 + moments + (2 if engine.choice.bf16 else 4))
    return trained * ((2 if engine.choice.reads_bf16(trained=True) else 4) + moments)


def is_full(error: Exception) -> bool:
    """Whether it tells of a full disk, which torch and safetensors do in words of their own."""
    return (isinstance(error, OSError) and error.errno in FULL) or bool(SAYS_FULL.search(str(error)))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints, oldest first; whether they are sound is another question."""
    found = [path for path in (output_dir / FOLDER).glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def set_aside_after(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after ``step`` to ``step-N.aside``: a run that goes on from ``step`` has given them up, and
    they must be neither 'latest' nor counted among those to keep. The new names. What an earlier resume set aside goes
    when there is something new: a run that falls back often must not fill the disk."""
    given_up = [path for path in list_checkpoints(output_dir) if _step_of(path) > step]
    for earlier in (output_dir / FOLDER).glob("step-*.aside") if given_up else ():
        shutil.rmtree(earlier, ignore_errors=True)
    return [path.rename(path.with_name(path.name + ".aside")) for path in given_up]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(name: str, output_dir: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The folder ``--resume_from_checkpoint`` means, every file of it looked at; None where ``auto`` starts anew.

    ``latest`` and ``auto`` pass over damaged ones and say so. UserError when there is none. Every rank calls.
    """
    if name not in ("latest", "auto"):
        if fault := fault_in(Path(name), world):
            raise UserError(f"--resume_from_checkpoint {name} cannot be used: {fault}; resume from another checkpoint")
        return Path(name)
    known = list_checkpoints(output_dir)
    world.barrier()  # nothing is renamed before all have looked
    for path in reversed(known):
        fault = fault_in(path, world)
        if fault is None:
            return path
        say(f"{path} is passed over: {fault}")
    if known:
        raise UserError(
            f"--resume_from_checkpoint {name}: none of the {len(known)} checkpoints in {output_dir / FOLDER} is sound; "
            "start anew with another --output_dir"
        )
    if name == "auto":
        return None
    raise UserError(f"--resume_from_checkpoint latest: {output_dir / FOLDER} holds no checkpoint; 'auto' would start")


def fault_in(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, every file of it looked at; None where nothing is. Every rank calls."""
    if not path.is_dir():
        return world.broadcast("there is no such folder")
    if fault := fault_of(path, world):
        return fault
    try:
        step = read_state(path)["step"]
    except UserError as error:  # whole, and of another version
        return str(error)
    return f"it holds step {step}" if NAME.fullmatch(path.name) and step != _step_of(path) else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``run.json`` of a checkpoint. UserError when it is damaged or of another version."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return {**state, **{key: state[key] for key in NEEDED}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint / STATE} is damaged or of another version ({error!r}); resume from another checkpoint"
        ) from None


UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What torch, safetensors and DeepSpeed say of a file that does not hold what it should."""


@contextmanager
def told_if_unreadable(checkpoint: Path) -> Iterator[None]:
    """A file of the engine's that does not hold what it should, which torch tells of in many ways, as one line."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint} cannot be read ({_in_a_line(error)}); resume from another checkpoint") from error


@contextmanager
def told_if_unwritable(folder: Path) -> Iterator[None]:
    """A full disk, which torch and safetensors tell of in their own ways, as one line that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_writing(error):
            raise
        raise TrainingError(_cannot_be_written(folder, _in_a_line(error), None)) from error


def is_of_writing(error: BaseException) -> bool:
    """Whether a file could not be written. A RuntimeError may be any fault, which free space would not mend; in those
    of files torch names its writer."""
    return not isinstance(error, RuntimeError) or bool(SAYS_WRITING.search(str(error)))


def _cannot_be_written(folder: Path, reason: str, needed: int | None) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    size = f"it needs about {in_words(needed)}, " if needed is not None else ""
    return (
        f"{folder} cannot be written ({reason}); {size}{in_words(free)} are free there; make room and go on from the "
        "newest checkpoint with --resume_from_checkpoint latest"
    )


def in_words(size: int) -> str:
    """Bytes, for the user."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _in_a_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0][:150]
