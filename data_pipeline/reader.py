"""``PairLoader``: batches for one rank, in an order that depends on the data, the seed and the global batch size only.

State is the number of consumed steps, a few hundred bytes, the same on all ranks. Resuming reads nothing again.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import webdataset as wds

from data_pipeline.ahead import Ahead
from data_pipeline.batch import Fault, PairBatch
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.encode import DROP_KINDS, Encoder
from data_pipeline.errors import DataError
from data_pipeline.index import bad_summary
from data_pipeline.order import PlanOptions, num_steps
from data_pipeline.stages import PlanSource, Share, encode_batches, read_records

__all__ = ["PairLoader", "open_dataset"]

log = logging.getLogger(__name__)

STATE_VERSION = 3
FAULT_KINDS = ("missing_shard", "truncated_shard", "changed_record", "invalid_record")
_KINDS = {"faults": FAULT_KINDS, "dropped": DROP_KINDS}
REMOTE_SHUFFLE_SHARDS = 8
FAULTS_LOGGED = 20
MAX_DROPPED = 0.9  # of the records seen
BATCHING = ("equal", "balanced")
REFUSED = {
    "fingerprint": "the data are not those of the checkpoint: ",
    "sharding": "the records lie in other shards, on which their order depends (shuffle_shards): ",
}


class PairLoader:
    """Micro-batches of pairs for one rank.

    ``for batch in loader`` gives the rest of the current epoch; ``steps()`` gives steps without end, each the list of
    this rank's micro-batches. Global step t of an epoch holds the same records for any number of ranks and workers and
    for any micro-batch size. ``epoch`` and ``step`` count what was consumed: when the last micro-batch of step t is
    handed out, ``step`` is t + 1, which is what a checkpoint written after that step must hold.

    ``tail``, ``shuffle_shards``, ``bucket_steps`` and ``limit`` are those of ``order.PlanOptions``; ``shuffle_shards``
    None is what a loaded state says, else 8 for remote shards and the whole corpus for local ones.
    ``batching="balanced"`` evens out the tokens of the micro-batches of a step (their sizes differ, alike on all ranks;
    their number does not).
    A record that cannot be read is an empty slot and a fault, counted and logged; ``strict`` raises instead, and so
    does a share of faults above ``max_fault_fraction``.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        encoder: Encoder,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        tail: str = "pad",
        batching: str = "equal",
        shuffle_shards: int | None = None,
        bucket_steps: int = 0,
        limit: int = 0,
        strict: bool = False,
        max_fault_fraction: float = 0.01,
        prefetch: int = 4,
    ):
        share = Share(rank, world_size, micro_batch_size, batching == "balanced")
        _check_share(share, global_batch_size)
        if num_workers < 0 or prefetch < 1 or not 0 <= max_fault_fraction <= 1:
            raise DataError(
                f"num_workers {num_workers}, prefetch {prefetch}, max_fault_fraction {max_fault_fraction}: allowed are "
                "workers >= 0, prefetch >= 1 and a fraction in [0, 1]"
            )
        if batching not in BATCHING:
            raise DataError(f"batching is {batching!r}; allowed: {', '.join(BATCHING)}")
        if strict:
            _refuse_bad_shards(dataset)
        if shuffle_shards and dataset.weights is not None:
            raise DataError("shuffle_shards cannot be combined with weights: sources are mixed over the whole corpus")
        self._follows_state = shuffle_shards is None  # not chosen: a resumed run goes on with what it began with
        if shuffle_shards is None:
            shuffle_shards = REMOTE_SHUFFLE_SHARDS if dataset.is_remote and dataset.weights is None else 0
        self.dataset, self.encoder = dataset, encoder
        self.options = PlanOptions(seed, global_batch_size, tail, shuffle_shards, bucket_steps, limit)
        self.share = share
        self.num_workers, self.prefetch = num_workers, prefetch
        self.strict, self.max_fault_fraction = strict, max_fault_fraction
        if not len(self):
            raise DataError(f"{len(dataset)} records do not fill a step of {global_batch_size} and tail is 'drop'")
        self.epoch, self.step = 0, 0
        self.seen = 0  # records of this rank since the start or load; so are the counts below
        self.faults, self.dropped = Counter[str](), Counter[str]()
        self.truncated = 0
        self._before = Counter[str]()  # of all ranks, before: seen, truncated, faults and drops by kind
        self._stream: Ahead[PairBatch] | None = None
        self._next = (0, 0, 0)  # (epoch, step, micro) that the stream gives next

    def __len__(self) -> int:
        """Steps of an epoch, the same on all ranks."""
        return num_steps(self.dataset.num_records, self.options)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in a step: the gradient accumulation."""
        return self.options.global_batch_size // self.share.world_size // self.share.micro_batch_size

    def __iter__(self) -> Iterator[PairBatch]:
        """The rest of the current epoch; then ``epoch`` is one more and ``step`` 0."""
        self._roll_over()
        self._align()
        while self.step < len(self):
            yield self._advance()
        self._roll_over()

    def steps(self) -> Iterator[list[PairBatch]]:
        """This rank's micro-batches of one global step after the other, without end."""
        while True:
            self._roll_over()
            self._align()
            yield [self._advance() for _ in range(self.micro_batches)]

    def _roll_over(self) -> None:
        if self.step >= len(self):
            self.epoch, self.step = self.epoch + 1, 0

    def _align(self) -> None:
        """Start the stream, anew if it stands elsewhere: after a load, or when a step was left half way."""
        if self._stream is None or self._next != (self.epoch, self.step, 0):
            self.close()
            self._stream, self._next = self._start(), (self.epoch, self.step, 0)

    def _start(self) -> Ahead[PairBatch]:
        pad = self.encoder.tokenizer.pad_token_id
        pad_id = self.encoder.terminator if pad is None else pad  # never scored, so any id will do
        pipeline = wds.DataPipeline(
            PlanSource(self.dataset, self.options, self.share, self.epoch, self.step),
            partial(read_records, dataset=self.dataset),
            partial(encode_batches, encoder=self.encoder, pad_id=int(pad_id or 0)),
        )
        depth = max(self.prefetch, self.micro_batches)  # the whole next step is made while this one is computed
        if not self.num_workers:
            return Ahead(iter(pipeline), depth)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of the workers
        loader = wds.WebLoader(pipeline, batch_size=None, num_workers=self.num_workers, prefetch_factor=self.prefetch)
        batches = iter(loader)
        return Ahead(_after(next(batches), batches), depth)  # next: the workers are forked here, not by the thread

    def _advance(self) -> PairBatch:
        assert self._stream is not None
        try:
            batch = next(self._stream)
            self._count(batch)
        except BaseException:
            self.close()  # who goes on all the same meets the same batch again
            raise
        last = batch.last_micro
        if last:
            self.step = batch.step + 1
        ended = last and self.step == len(self)
        self._next = (
            (batch.epoch + 1, 0, 0) if ended else (batch.epoch, batch.step + last, 0 if last else batch.micro + 1)
        )
        return batch

    def close(self) -> None:
        """Stop reading ahead. The loader can be used again; it goes on at the first step not consumed."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    # ------------------------------------------------------------------------------------------------- faults

    def _count(self, batch: PairBatch) -> None:
        self.seen += sum(map(bool, batch.ids)) + len(batch.faults) + len(batch.dropped)
        self.truncated += batch.truncated
        self.dropped.update(item.kind for item in batch.dropped)
        for fault in batch.faults:
            if self.strict:
                raise DataError(describe(fault) + "; without --strict it would be skipped and counted")
            if sum(self.faults.values()) < FAULTS_LOGGED:
                log.warning("skipped: %s", describe(fault))
            self.faults[fault.kind] += 1
        if batch.dropped:
            self._refuse_empty_training()
        allowed = self.max_fault_fraction * max(self.seen, min(1000, self.dataset.num_records))
        if batch.faults and sum(self.faults.values()) > allowed:
            raise DataError(
                f"{sum(self.faults.values())} of {self.seen} records read here are faulty, more than "
                f"max_fault_fraction {self.max_fault_fraction:g} allows; last: {describe(batch.faults[-1])}; "
                "check the shards with `python -m data_pipeline verify`"
            )

    def _refuse_empty_training(self) -> None:
        """A run in which next to nothing is learned from looks healthy from outside: stop it."""
        dropped = sum(self.dropped.values())
        if self.seen >= min(1000, self.dataset.num_records) and dropped > MAX_DROPPED * self.seen:
            raise DataError(
                f"{dropped} of {self.seen} records were dropped when encoded ({_listed(self.dropped)}); raise "
                "max_length, cut instead of dropping, or choose another template; `python -m data_pipeline stats "
                "--tokenizer` shows what fits"
            )

    def totals(self, reduce: Callable[[Sequence[int]], Sequence[int]] | None = None) -> dict:
        """{seen, truncated, faults by kind, dropped by kind}: records since the start of the run.

        ``reduce`` sums a list of numbers over all ranks.
        """
        names = ("seen", "truncated", *FAULT_KINDS, *DROP_KINDS)
        here = Counter(seen=self.seen, truncated=self.truncated) + self.faults + self.dropped
        local = [here[name] for name in names]
        summed = zip(names, reduce(local) if reduce else local, strict=True)
        counts = {name: self._before[name] + int(count) for name, count in summed}
        kinds = {what: {k: counts[k] for k in some if counts[k]} for what, some in _KINDS.items()}
        return {"seen": counts["seen"], "truncated": counts["truncated"], **kinds}

    def summary(self, reduce: Callable[[Sequence[int]], Sequence[int]] | None = None) -> str:
        """One line of what was not learned from as it stands in the data: left out, cut, unreadable. '' if nothing."""
        totals = self.totals(reduce)
        dropped, faults, cut = totals["dropped"], totals["faults"], totals["truncated"]
        parts = [f"{sum(dropped.values())} left out ({_listed(dropped)})"] if dropped else []
        parts += [f"{cut} cut to fit max_length {self.encoder.max_length}"] if cut else []
        parts += [f"{sum(faults.values())} unreadable ({_listed(faults)})"] if faults else []
        return f"of {totals['seen']} records: {', '.join(parts)}" if parts else ""

    # -------------------------------------------------------------------------------------------------- state

    def _identity(self, options: PlanOptions) -> dict:
        return {
            "version": STATE_VERSION,
            "fingerprint": self.dataset.fingerprint,
            "seed": options.seed,
            "global_batch_size": options.global_batch_size,
            "tail": options.tail,
            "shuffle_shards": options.shuffle_shards,
            "bucket_steps": options.bucket_steps,
            **({"limit": options.limit} if options.limit else {}),
            "sharding": self.dataset.sharding(options),
        }

    def state_dict(self, reduce: Callable[[Sequence[int]], Sequence[int]] | None = None) -> dict:
        """What was consumed. With several ranks, ``reduce`` (a sum over ranks) makes the counts those of all."""
        ended = self.step >= len(self)
        place = {"epoch": self.epoch + ended, "step": 0 if ended else self.step}
        return self._identity(self.options) | place | self.totals(reduce)

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken, under any world size, micro-batch size and number of workers.

        Raises DataError when data, seed, global batch size or order options are not those of the state.
        """
        missing = sorted(({"epoch", "step", *self.totals()} | self._identity(self.options).keys()) - state.keys())
        if missing:
            raise DataError(f"the loader state has no {', '.join(missing)}: not a state of this loader")
        options = self.options
        if self._follows_state and self.dataset.weights is None:
            options = replace(options, shuffle_shards=int(state["shuffle_shards"]))
        for name, value in self._identity(options).items():
            if state[name] != value:
                raise DataError(
                    f"resume: {REFUSED.get(name, '')}{name} was {state[name]!r} and is {value!r}; give what it was, or "
                    "start anew"
                )
        self.close()
        self.options = options
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.seen, self.truncated = 0, 0
        self.faults, self.dropped = Counter(), Counter()
        self._before = Counter(seen=int(state["seen"]), truncated=int(state["truncated"]))
        self._before.update({**state["faults"], **state["dropped"]})


def _after(first: PairBatch, rest: Iterator[PairBatch]) -> Iterator[PairBatch]:
    yield first
    yield from rest


def _check_share(share: Share, global_batch_size: int) -> None:
    world_size, micro = share.world_size, share.micro_batch_size
    if min(micro, world_size) < 1 or global_batch_size % (world_size * micro):
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of world_size {world_size} x micro_batch_size "
            f"{micro}; change one of them"
        )
    if not 0 <= share.rank < world_size:
        raise DataError(f"rank is {share.rank} of {world_size}; ranks count from 0")


def _refuse_bad_shards(dataset: ShardedDataset) -> None:
    bad = [item for part in dataset.parts for item in part.index.manifest["bad"]]
    if bad:
        raise DataError(f"{bad_summary(bad)}; without --strict they would be left out")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))


def describe(fault: Fault) -> str:
    """A fault in one line."""
    return f"{fault.shard}, record {fault.key}: {fault.kind}: {fault.error}"
