"""Names of held-out items: by them two runs are compared record by record (``item_file.py``)."""

import hashlib
from collections.abc import Sequence

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.world import World
from diffdpo.evaluation.tasks.problems import Problem


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
    texts = [f"{tokenizer.decode(list(p.ids), skip_special_tokens=True)}\0{p.truth}" for p in problems]
    return [hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for text in texts]
