"""What can be known of opened data before training, as plain facts; whoever trains decides what they mean."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import Fault
from data_pipeline.dataset import ShardedDataset
from data_pipeline.encode import Drop, Encoder
from data_pipeline.errors import DataError
from data_pipeline.stages import RecordReader

LOOKED_AT = 32  # records tried out beforehand


@dataclass(frozen=True)
class Kinds:
    """Records by kind, and how many prompts there are."""

    pairs: int
    desirable: int
    undesirable: int
    prompts: int


def count_kinds(dataset: ShardedDataset) -> Kinds:
    """Pairs, single answers by label, and different prompts, from the index alone."""
    chosen, rejected = (_column(dataset, f"{side}_bytes") > 0 for side in ("chosen", "rejected"))
    prompts = len(np.unique(_column(dataset, "prompt")))
    both = int((chosen & rejected).sum())
    return Kinds(both, int(chosen.sum()) - both, int(rejected.sum()) - both, prompts)


@dataclass(frozen=True)
class Overlap:
    """How many records of held-out data have a content, or only a prompt, that is trained on."""

    held_out: int
    records: int
    prompts: int


def overlap(train: ShardedDataset, held_out: ShardedDataset) -> Overlap:
    """What of the held-out data is trained on, from the two indices alone."""
    same = {name: np.isin(_column(held_out, name), _column(train, name)) for name in ("content", "prompt")}
    return Overlap(len(held_out), int(same["content"].sum()), int(same["prompt"].sum()))


def _column(dataset: ShardedDataset, name: str) -> np.ndarray:
    return np.concatenate([part.column(name) for part in dataset.parts])


def longest_text(dataset: ShardedDataset) -> int:
    """UTF-8 bytes of the longest prompt with its longer answer: no tokenizer makes more tokens of them, apart from the
    template's."""
    return int(dataset.lengths.max()) if len(dataset) else 0


def refuse_unusable(dataset: ShardedDataset, encoder: Encoder) -> None:
    """DataError, with the first reason, when of some records from all over the data (behind URLs: of the first) none
    can be encoded: then nothing would be trained on, and the reason, such as a template's, is the same for all."""
    last = min(LOOKED_AT, len(dataset)) if dataset.is_remote else len(dataset)
    numbers = np.unique(np.linspace(0, last - 1, min(LOOKED_AT, last)).astype(int)).tolist()
    reader, first = RecordReader(dataset), None
    try:
        for number in numbers:
            record = reader(number)
            if isinstance(record, Fault):
                continue
            if not isinstance(encoded := encoder(record), Drop):
                return
            first = first or encoded
    finally:
        reader.close()
    if first is not None:
        raise DataError(
            f"all of the {len(numbers)} records looked at are left out, the first for {first.reason}: {first.detail}; "
            "`python -m data_pipeline inspect ... --tokenizer MODEL` shows them"
        )
