"""Held-out results item by item, in ``held_out.json`` of a run: what two runs are compared by, record by record.

The file holds ``data`` (fingerprint of the held-out data), ``records`` and ``problems`` (names of the items, in the
order of the values) and ``before`` / ``after``: a list of values for each metric.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.world import World
from diffdpo.evaluation.answers import Problem
from diffdpo.evaluation.result import Evaluation

FILE = "held_out.json"
DIGITS = 7  # of a value: more than two evaluations of the same weights share


def record_names(batches: Sequence[PairBatch], counts: Sequence[torch.Tensor], world: World) -> list[str]:
    """Ids of the records whose ``counts`` (one number a slot of each batch) are above 0, of all ranks, by number."""
    own = [
        (number, name)
        for batch, count_B in zip(batches, counts, strict=True)
        for number, name, count in zip(batch.records, batch.ids, count_B.tolist(), strict=True)
        if count > 0
    ]
    return [name for _, name in sorted(pair for part in world.all_gather_object(own) for pair in part)]


def problem_names(problems: Sequence[Problem], tokenizer) -> list[str]:
    """A digest of prompt and right answer, whatever the tokenizer."""
    texts = [f"{tokenizer.decode(list(p.prompt), skip_special_tokens=True)}\0{p.truth}" for p in problems]
    return [hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for text in texts]


class ItemFile:
    """``held_out.json`` of a run; written on rank 0."""

    def __init__(self, output_dir: Path, data: str | None, names: Mapping[str, list[str]]):
        self.path = output_dir / FILE
        self.content: dict[str, Any] = {"data": data, **names}

    def write(self, when: str, evaluation: Evaluation) -> None:
        """Add the values of a moment, ``before`` or ``after``; the file is whole at any time."""
        self.content[when] = {
            key: [float(f"{value:.{DIGITS}g}") for value in values] for key, values in evaluation.values.items()
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content))
        partial.replace(self.path)
