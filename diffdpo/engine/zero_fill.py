"""Weights and AdamW's state, whole and by name, into what a DeepSpeed engine holds of them.

For checkpoints that DeepSpeed's own reader does not take: of another stage, number of processes or engine. (Its way is
a converted copy of the whole checkpoint on the disk, its "universal" format.) A process keeps its pieces of each
tensor; where they lie is told by DeepSpeed 0.19's ``zero/stage_1_and_2.py`` and ``zero/stage3.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffdpo.engine.saved import trained_by_name

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """``size`` numbers of a weight from ``start`` on, which lie in the vector ``flat`` from ``offset`` on."""

    flat: torch.Tensor
    offset: int
    start: int
    size: int

    def put(self, vector: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy ours of a whole tensor into a vector like ``flat``. What it has not (padding) stays."""
        ours = whole.reshape(-1)[self.start : self.start + self.size]
        vector.view(-1)[self.offset : self.offset + len(ours)].copy_(ours)


@torch.no_grad()
def fill_engine(engine: Any, module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, stage: int) -> None:
    """Put (NAME, fp32 weight), (NAME.exp_avg, ...), (NAME.exp_avg_sq, ...) and (NAME.step, ...) in place. Every rank
    calls; ``engine`` is DeepSpeed's."""
    optimizer, trained = engine.optimizer, trained_by_name(module)
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    pieces = {name: piece_of(optimizer, parameter, stage) for name, parameter in trained.items()}
    base = getattr(optimizer, "optimizer", optimizer)
    states = {id(piece.flat): state_of(base, piece.flat) for piece in pieces.values() if piece}
    for state in states.values():
        for what in MOMENTS:
            state[what].zero_()
    steps = 0.0
    for name, whole in tensors:
        weight, _, what = name.rpartition(".")
        if what == "step" and weight in trained:
            steps = max(steps, float(whole))
        elif piece := pieces[weight if what in MOMENTS else name]:
            piece.put(states[id(piece.flat)][what] if what in MOMENTS else piece.flat.data, whole)
    for state in states.values():
        state["step"] = count_of(base, steps, state["exp_avg"])
    _renew_weights(optimizer, stage)


def piece_of(optimizer: Any, parameter: Any, stage: int) -> Piece | None:
    """This process's of a weight; None where it has none of it."""
    if stage == 0:
        return Piece(parameter, 0, 0, parameter.numel())
    if stage == 3:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        rank = optimizer._get_param_partition_rank(parameter)
        return Piece(optimizer.fp32_partitioned_groups_flat[group], offset, rank * size, size)
    if (held := parameter._hp_mapping) is None:
        return None
    flat = optimizer.single_partition_of_fp32_groups[held.param_group_index]
    return Piece(flat, held.hp_fragment_address.start, held.lp_fragment_address.start, held.lp_fragment_address.numel)


def state_of(base: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """AdamW's state of a vector, made with moments of 0 where it is not there before the first step."""
    state = base.state[flat]
    for what in MOMENTS:
        if what not in state:
            state[what] = torch.zeros_like(flat).detach()
    return state


def count_of(base: torch.optim.Optimizer, steps: float, like: torch.Tensor) -> Any:
    """Steps taken, as this AdamW counts them: torch's in a tensor, DeepSpeed's own in a number."""
    if not isinstance(base, torch.optim.AdamW):
        return int(steps)
    on_device = base.defaults.get("fused") or base.defaults.get("capturable")
    return torch.tensor(steps, device=like.device if on_device else "cpu")


def _renew_weights(optimizer: Any, stage: int) -> None:
    """Have the weights that forwards use follow from their fp32 masters."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage != 3:
        return
    groups = zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for masters, flat, parts in groups:
        flat.data.copy_(masters.data)
        for part, renewed in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = renewed.data
    if optimizer.persistent_parameters:  # whole on every process: let go of what they were
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
