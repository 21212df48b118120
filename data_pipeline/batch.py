"""What a training step eats: a micro-batch of pairs as right-padded token rows.

Shape suffixes: B pairs of the micro-batch, 2 sides (0 chosen, 1 rejected), T longest row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.encode import TokenPair


@dataclass(frozen=True)
class Fault:
    """A record that could not be used: kind, shard and key of the record, and what happened."""

    kind: str
    shard: str
    key: str
    error: str


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch.

    ``input_ids_B2T`` prompt + answer + terminator; ``lengths_B2`` counts them (0: no such side) and
    ``prompt_lengths_B2`` the prompt's share, so tokens prompt_length .. length are scored. ``weight_B2`` is (1, 1) for
    a pair, (1, 0) / (0, 1) for an unpaired desirable / undesirable answer, (0, 0) for an empty slot, a fault or a
    record dropped by the truncation policy. ``ids`` are record ids, '' where the weight is (0, 0); ``records`` their
    numbers in the data set (-1: an empty slot), where the batch comes from one; ``meta`` their meta ({}: none), where a
    task finds the right result.
    """

    input_ids_B2T: torch.Tensor
    lengths_B2: torch.Tensor
    prompt_lengths_B2: torch.Tensor
    weight_B2: torch.Tensor
    ids: tuple[str, ...]
    epoch: int
    step: int
    micro: int
    last_micro: bool
    faults: tuple[Fault, ...] = ()
    dropped: tuple[Fault, ...] = ()  # by policy (over-long, ...): counted apart, no fault of the data
    truncated: int = 0  # pairs of which something was cut
    records: tuple[int, ...] = ()
    meta: tuple[Mapping[str, Any], ...] = ()

    def __reduce__(self):
        """Pickled as numpy arrays, ids in 32 bits: as tensors they would travel from worker to trainer by one file
        descriptor each, which costs more than their 20 kB; and several batches fit into the pipe between the two."""
        small = (self.input_ids_B2T, self.lengths_B2, self.prompt_lengths_B2)
        arrays = (*(tensor.to(torch.int32).numpy() for tensor in small), self.weight_B2.numpy())
        names = ("ids", "epoch", "step", "micro", "last_micro", "faults", "dropped", "truncated", "records", "meta")
        return _from_arrays, (*arrays, {name: getattr(self, name) for name in names})

    @property
    def pair_weight_B(self) -> torch.Tensor:
        """1 for a whole pair, else 0."""
        return self.weight_B2.prod(1)


def _from_arrays(
    ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, weight: np.ndarray, rest: dict[str, Any]
) -> PairBatch:
    return PairBatch(
        input_ids_B2T=torch.from_numpy(ids).long(),
        lengths_B2=torch.from_numpy(lengths).long(),
        prompt_lengths_B2=torch.from_numpy(prompts).long(),
        weight_B2=torch.from_numpy(weight),
        **rest,
    )


def collate(
    pairs: Sequence[TokenPair | None],
    *,
    pad_id: int,
    epoch: int,
    step: int,
    micro: int,
    last_micro: bool,
    faults: tuple[Fault, ...] = (),
    dropped: tuple[Fault, ...] = (),
    records: tuple[int, ...] = (),
) -> PairBatch:
    """Pairs (None: a slot of weight 0) → PairBatch. T is at least 1, also when there is nothing in it."""
    sides = [(pair.chosen, pair.rejected) if pair else (None, None) for pair in pairs]
    longest = max((len(answer.ids) for both in sides for answer in both if answer), default=1)
    shape = (len(pairs), 2)
    # numpy: a large torch.full would start a team of OpenMP threads in the thread that reads ahead
    ids = np.full((*shape, max(1, longest)), pad_id, np.int64)
    lengths, prompts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for b, both in enumerate(sides):
        for side, answer in enumerate(both):
            if answer:
                ids[b, side, : len(answer.ids)] = answer.ids
                lengths[b, side], prompts[b, side] = len(answer.ids), answer.prompt_length
    return PairBatch(
        input_ids_B2T=torch.from_numpy(ids),
        lengths_B2=torch.from_numpy(lengths),
        prompt_lengths_B2=torch.from_numpy(prompts),
        weight_B2=torch.from_numpy((lengths > 0).astype(np.float32)),
        ids=tuple(pair.id if pair else "" for pair in pairs),
        epoch=epoch,
        step=step,
        micro=micro,
        last_micro=last_micro,
        faults=faults,
        dropped=dropped,
        truncated=sum(pair.truncated for pair in pairs if pair),
        records=records,
        meta=tuple(pair.meta if pair else {} for pair in pairs),
    )
