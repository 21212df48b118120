"""How DeepSpeed's checkpoints reach the disk: its own layout, written and read through this.

Its own reader runs whatever a pickle says. This one builds tensors, containers and three kinds of DeepSpeed's own
objects, and refuses anything else before it is made.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdpo.engine.saved import check_trained, trained_by_name

TAG = "engine"  # the folder of a checkpoint that DeepSpeed writes into


class CheckpointFiles:
    """Takes the place of an engine's ``checkpoint_engine``.

    Of a module only the trained weights are written. A failure to write is kept in ``error``, as the other ranks wait
    for this one in the rest of DeepSpeed's ``save_checkpoint``; raise it afterwards.
    """

    def __init__(self, given: Any, module: nn.Module):
        self.given, self.module = given, module
        self.error: OSError | RuntimeError | None = None
        self.kept: dict[Path, Any] | None = None  # in the place of files
        self.folder = Path()  # that their names are told in
        self.saved_shapes: dict[str, Sequence[int]] = {}  # of the trained weights, in what was read last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        state = dict(state_dict)
        if state.get("module") is not None:
            trained = trained_by_name(self.module)
            state["module"] = {name: value for name, value in state["module"].items() if name in trained}
        if self.kept is not None:
            self.kept[Path(path).relative_to(self.folder)] = copied(state)
            return
        try:
            torch.save(state, path)
        except (OSError, RuntimeError) as error:
            self.error = error

    @contextmanager
    def kept_in_memory(self, folder: Path) -> Iterator[dict[Path, Any]]:
        """Inside, what would be written below ``folder`` is copied and kept, by its name there."""
        self.kept, self.folder = {}, folder
        try:
            yield self.kept
        finally:
            self.kept = None

    def load(self, path: str, map_location: Any = None) -> Any:
        state = load_safely(path, map_location=map_location)
        if "module" in state:
            shapes: dict[str, Sequence[int]] = {name: tuple(weight.shape) for name, weight in state["module"].items()}
            for group in state.get("param_shapes") or ():  # of ZeRO; stage 3's module is empty
                shapes.update({name: tuple(shape) for name, shape in group.items()})
            self.saved_shapes = shapes
        return state

    def raise_error(self) -> None:
        """What a ``save`` met."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def check_loaded(self) -> None:
        """UserError unless what was read last holds the module's trained weights."""
        check_trained(self.saved_shapes, self.module)


def copied(state: Any) -> Any:
    """A state in host memory that nothing else holds."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if type(state) in (dict, OrderedDict):
        return type(state)((key, copied(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(copied(value) for value in state)
    return copy.deepcopy(state)


def write_files(folder: Path, states: Mapping[Path, Any], others: Mapping[Path, bytes]) -> None:
    """Files by their names in a folder. OSError or RuntimeError where the disk fails."""
    for name in [*states, *others]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        torch.save(state, folder / name)
    for name, content in others.items():
        (folder / name).write_bytes(content)


def load_safely(path: str | PathLike[str], *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What DeepSpeed wrote, of kinds that are known to do nothing when they are made."""
    with torch.serialization.safe_globals(_kinds()):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def _kinds() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
