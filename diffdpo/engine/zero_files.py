"""Weights and AdamW's state out of a DeepSpeed checkpoint, tensor by tensor, for engines that cut otherwise.

ZeRO writes one flat vector a parameter group and process (0.19: ``zero/stage_1_and_2.py``, ``zero/stage3.py``). Under
stages 1 and 2 the processes' vectors, end to end, hold the group's weights one after the other, with the paddings that
are noted beside them. Under stage 3 each weight is cut into N equal pieces, and a process's vectors hold its pieces.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffdpo.engine.deepspeed_files import load_safely
from diffdpo.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
OF_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def refuse_offloaded(folder: Path) -> None:
    """UserError for a folder that DeepSpeed itself wrote of state on NVMe, which it cannot read again."""
    if (folder / "offloaded_tensors").is_dir():
        raise UserError(
            f"{folder.parent}: the state of its run was on NVMe, and DeepSpeed's files of that are not read; take the "
            "run's final/ model"
        )


class ZeroFiles:
    """The files of a checkpoint of stage 1 to 3, mapped into memory and read as they are used."""

    def __init__(self, folder: Path):
        refuse_offloaded(folder)
        ranks = {int(found[1]): path for path in folder.iterdir() if (found := OF_RANK.search(path.name))}
        if not ranks:
            raise ValueError(f"{folder} holds no state of a sharded optimizer (ZeRO stage 1 or more)")
        self.states = [load_safely(ranks[rank], mmap=True)["optimizer_state_dict"] for rank in sorted(ranks)]
        self.stage = int(self.states[0]["zero_stage"])
        model = next(path for path in sorted(folder.glob("*model_states.pt")))
        self.groups: list[Mapping[str, torch.Size]] = load_safely(model, mmap=True)["param_shapes"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that ``tensors`` gives."""
        found = {name: tuple(shape) for group in self.groups for name, shape in group.items()}
        return found | {f"{name}.{what}": shape for name, shape in found.items() for what in MOMENTS}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(NAME, fp32 weight), (NAME.exp_avg, ...), (NAME.exp_avg_sq, ...) and (NAME.step, ...), each whole."""
        yield from self.weights()
        for what in MOMENTS:
            for name, tensor in self._each(what):
                yield f"{name}.{what}", tensor
        for name in (name for group in self.groups for name in group):
            yield f"{name}.step", torch.tensor(self._steps())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(NAME, fp32 weight), each whole."""
        return self._each(None)

    def _each(self, what: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        return self._at_stage_3(what) if self.stage == 3 else self._below_stage_3(what)

    def _below_stage_3(self, what: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        paddings = self.states[0].get("param_alignment_paddings") or [[0] * len(group) for group in self.groups]
        for index, group in enumerate(self.groups):
            vectors, offset = [self._vectors(state, what)[index] for state in self.states], 0
            for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
                yield name, _piece(vectors, offset, math.prod(shape)).view(shape)
                offset += math.prod(shape) + padding

    def _at_stage_3(self, what: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        offset = 0
        for name, shape in (item for group in self.groups for item in group.items()):
            size = -(-math.prod(shape) // len(self.states))
            pieces = [_piece(self._vectors(state, what), offset, size) for state in self.states]
            yield name, torch.cat(pieces)[: math.prod(shape)].view(shape)
            offset += size

    def _vectors(self, state: Mapping[str, Any], what: str | None) -> Sequence[torch.Tensor]:
        """A process's, one a group, or under stage 3 one a piece of a group."""
        if what is None:
            return state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
        states = self._of_optimizer(state)["state"]
        return [states[index][what].view(-1) for index in sorted(states)]

    def _of_optimizer(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    def _steps(self) -> float:
        """Which AdamW counts by the vector or by the group: all alike."""
        optimizer = self._of_optimizer(self.states[0])
        counts = [state["step"] for state in optimizer["state"].values() if "step" in state]
        counts += [group["step"] for group in optimizer["param_groups"] if "step" in group]
        return float(counts[0])


def _piece(vectors: Sequence[torch.Tensor], offset: int, size: int) -> torch.Tensor:
    """``size`` numbers from ``offset`` on of vectors laid end to end."""
    found, begin = [], 0
    for vector in vectors:
        start, stop = max(offset - begin, 0), min(offset + size - begin, vector.numel())
        if start < stop:
            found.append(vector[start:stop])
        begin += vector.numel()
    return torch.cat(found).float()
