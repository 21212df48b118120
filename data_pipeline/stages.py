"""The loader's stages, each a generator function over an iterator: plan → read → encode → PairBatch.

They run in the loader's worker processes as a ``webdataset.DataPipeline``. Each can be tested on a list.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.batch import Fault, PairBatch, collate
from data_pipeline.dataset import ShardedDataset
from data_pipeline.encode import Drop, Encoder, TokenPair
from data_pipeline.errors import DataError
from data_pipeline.order import PAD, PlanOptions, as_steps, deal_step, micro_sizes, num_steps
from data_pipeline.records import Record, RecordError
from data_pipeline.sources.formats import reader_of

OPEN_SHARDS = 64  # file descriptors a worker holds at most


@dataclass(frozen=True)
class Share:
    """Which part of each step is computed here. ``balance``: micro-batches of like token number, not of like size."""

    rank: int
    world_size: int
    micro_batch_size: int
    balance: bool = False


@dataclass(frozen=True)
class MicroPlan:
    """The record numbers of one micro-batch (PAD for an empty slot) and its place in the run."""

    records: np.ndarray
    epoch: int
    step: int
    micro: int
    last_micro: bool


def micro_plans(
    dataset: ShardedDataset, options: PlanOptions, share: Share, *, epoch: int = 0, step: int = 0
) -> Iterator[MicroPlan]:
    """This rank's micro-batches from (epoch, step) on, epoch after epoch, without end."""
    while True:
        if step < num_steps(dataset.num_records, options):
            yield from _epoch_plans(dataset, options, share, epoch, step)
        epoch, step = epoch + 1, 0


def _epoch_plans(
    dataset: ShardedDataset, options: PlanOptions, share: Share, epoch: int, first: int
) -> Iterator[MicroPlan]:
    lengths = dataset.lengths
    records_SG = as_steps(dataset.order(options, epoch), options, epoch, lengths)
    for step in range(first, len(records_SG)):
        sizes = micro_sizes(
            records_SG[step],
            lengths,
            world_size=share.world_size,
            micro_batch_size=share.micro_batch_size,
            balance=share.balance,
        )
        mine = deal_step(records_SG[step], lengths, rank=share.rank, world_size=share.world_size, sizes=sizes)
        for micro, records in enumerate(mine):
            yield MicroPlan(records, epoch, step, micro, micro == len(mine) - 1)


class PlanSource(IterableDataset):
    """``micro_plans`` dealt to the loader's workers in turn: its round robin restores their order."""

    def __init__(self, dataset: ShardedDataset, options: PlanOptions, share: Share, epoch: int, step: int):
        self.dataset, self.options, self.share = dataset, options, share
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[MicroPlan]:
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        plans = micro_plans(self.dataset, self.options, self.share, epoch=self.epoch, step=self.step)
        return islice(plans, number, None, of)


class RecordReader:
    """Reads records by their number. What is read must be what was indexed, to the bit; else it is a Fault."""

    def __init__(self, dataset: ShardedDataset):
        self.dataset = dataset
        self.files: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.unreachable: dict[tuple[int, int], str] = {}  # shards that were tried long enough
        self.decode = [reader_of(part.index.manifest) for part in dataset.parts]

    def __call__(self, number: int) -> Record | Fault:
        """The record, or the Fault: ``missing_shard``, ``truncated_shard``, ``changed_record``, ``invalid_record``."""
        part, row = self.dataset.locate(number)
        index = self.dataset.parts[part].index
        shard, entry = index.shard_of(row), index.entries[row]

        def fault(kind: str, error: object) -> Fault:
            return Fault(kind, index.url(shard), index.key(row), str(error))

        try:
            raw = os.pread(self._file(part, shard), int(entry["size"]), int(entry["offset"]))
        except (OSError, DataError) as error:
            return fault("missing_shard", error)
        if len(raw) < entry["size"]:
            return fault("truncated_shard", f"{len(raw)} of {entry['size']} bytes are there")
        if zlib.crc32(raw) != entry["crc"]:
            return fault("changed_record", "the bytes are not those that were indexed: damage, or another shard")
        try:
            record = self.decode[part](raw)
        except RecordError as error:
            return fault("invalid_record", error)
        return record if len(self.dataset.parts) == 1 else replace(record, id=f"{part}/{record.id}")

    def _file(self, part: int, shard: int) -> int:
        key = (part, shard)
        if key in self.unreachable:
            raise DataError(self.unreachable[key])
        if key not in self.files:
            try:
                path = self.dataset.parts[part].index.local_shard(shard, self.dataset.cache_dir)
            except DataError as error:
                self.unreachable[key] = str(error)
                raise
            if len(self.files) >= OPEN_SHARDS:
                os.close(self.files.popitem(last=False)[1])
            self.files[key] = os.open(path, os.O_RDONLY)
        self.files.move_to_end(key)
        return self.files[key]

    def close(self) -> None:
        """Close the open shards."""
        while self.files:
            os.close(self.files.popitem()[1])


def read_records(plans: Iterable[MicroPlan], dataset: ShardedDataset) -> Iterator[tuple[MicroPlan, list]]:
    """Stage: the records (or Fault, or None for an empty slot) of each micro-batch."""
    reader = RecordReader(dataset)
    try:
        for plan in plans:
            yield plan, [None if number == PAD else reader(int(number)) for number in plan.records]
    finally:
        reader.close()


def encode_batches(read: Iterable[tuple[MicroPlan, list]], encoder: Encoder, pad_id: int) -> Iterator[PairBatch]:
    """Stage: tokens, padded. Faults and dropped records leave a slot of weight 0, so counts never depend on data."""
    for plan, records in read:
        slots: list[TokenPair | Drop | None] = [None] * len(records)
        usable = [i for i, item in enumerate(records) if item is not None and not isinstance(item, Fault)]
        for i, item in zip(usable, encoder.encode_many([records[i] for i in usable]), strict=True):
            slots[i] = item
        dropped = tuple(
            Fault(item.reason, "", record.id, item.detail)
            for item, record in zip(slots, records, strict=True)
            if isinstance(item, Drop)
        )
        yield collate(
            [None if isinstance(item, Drop) else item for item in slots],
            pad_id=pad_id,
            epoch=plan.epoch,
            step=plan.step,
            micro=plan.micro,
            last_micro=plan.last_micro,
            faults=tuple(item for item in records if isinstance(item, Fault)),
            dropped=dropped,
            records=tuple(plan.records.tolist()),
        )
