"""The order of an epoch: a pure function of (counts, seed, epoch, options), with nothing of ranks, workers or time.

Global step t is row t of a ``[steps, global_batch_size]`` array of record numbers; PAD (-1) marks the empty slots of
the last step. Who computes which slot of a row is decided here too, so that ranks and micro-batches only slice it.

Letters: N records, S steps, G slots of a global step (global batch), A micro-batches of a rank and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError

PAD = -1
TAILS = ("pad", "drop")


@dataclass(frozen=True)
class PlanOptions:
    """What decides an epoch's order besides the data.

    ``tail``: fill the last step with empty slots (``pad``), or leave its records out this time (``drop``).
    ``shuffle_shards``: records are shuffled over groups of so many shards (0: over the whole corpus). A group is what a
    rank must have fetched to go on; 0 is right for local shards, 4-8 for remote ones that were shuffled when built.
    ``bucket_steps``: within runs of so many steps, records of like length are brought together into one step (0: not).
    ``limit``: an epoch is the first so many records of its order (0: all), which are the same for every batch size.
    """

    seed: int
    global_batch_size: int
    tail: str = "pad"
    shuffle_shards: int = 0
    bucket_steps: int = 0
    limit: int = 0

    def __post_init__(self):
        if self.global_batch_size < 1:
            raise DataError(f"global_batch_size is {self.global_batch_size}; it must be at least 1")
        if self.tail not in TAILS:
            raise DataError(f"tail is {self.tail!r}; allowed: {', '.join(TAILS)}")
        if min(self.shuffle_shards, self.bucket_steps, self.limit, self.seed) < 0:
            raise DataError("seed, shuffle_shards, bucket_steps and limit must be at least 0")


def generator(*key: int) -> np.random.Generator:
    """Counter-based generator of a key: the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(part) for part in key])))


def num_steps(records: int, options: PlanOptions) -> int:
    """Steps of an epoch: known to every rank from the number of records alone."""
    whole, rest = divmod(min(records, options.limit or records), options.global_batch_size)
    return whole + (options.tail == "pad" and rest > 0)


def shuffled_records(shard_counts: Sequence[int], options: PlanOptions, epoch: int) -> np.ndarray:
    """All record numbers in the epoch's order: shards permuted, then a full shuffle within each group of shards."""
    counts = np.asarray(shard_counts, np.int64)
    group = options.shuffle_shards or max(1, len(counts))
    if group >= len(counts):
        return generator(options.seed, epoch, 1, 0).permutation(int(counts.sum()))
    starts = np.cumsum(counts) - counts
    shards = generator(options.seed, epoch, 0).permutation(len(counts))
    parts = []
    for number, first in enumerate(range(0, len(shards), group)):
        members = [np.arange(starts[s], starts[s] + counts[s]) for s in shards[first : first + group]]
        parts.append(generator(options.seed, epoch, 1, number).permutation(np.concatenate(members)))
    return np.concatenate(parts)


def take_share(size: int, count: int, *, seed: int, source: int, epoch: int) -> np.ndarray:
    """The ``count`` records of a source of ``size`` that stand in ``epoch`` when sources are mixed by weight.

    They are cut from an endless sequence of full permutations, one pass after the other, so that after any number of
    epochs two records of a source differ by at most one in how often they were met.
    """
    if count == 0:
        return np.zeros(0, np.int64)
    first, last = epoch * count, (epoch + 1) * count
    passes = [generator(seed, source, 2, p).permutation(size) for p in range(first // size, -(-last // size))]
    return np.concatenate(passes)[first % size :][:count]


def shares(sizes: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """Records of each source in an epoch as long as all sources together, in proportion to the weights (rounded so
    that the sum is exact: largest remainders first)."""
    exact = np.array(weights, float) / np.sum(weights) * sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: sum(sizes) - counts.sum()]] += 1
    return counts


def mixed_records(sizes: Sequence[int], weights: Sequence[float], options: PlanOptions, epoch: int) -> np.ndarray:
    """Record numbers (sources end to end) of an epoch in which each source has its share, fully shuffled."""
    starts = np.cumsum(sizes) - np.asarray(sizes)
    parts = [
        starts[source] + take_share(sizes[source], int(count), seed=options.seed, source=source, epoch=epoch)
        for source, count in enumerate(shares(sizes, weights))
    ]
    return generator(options.seed, epoch, 1, 0).permutation(np.concatenate(parts))


def as_steps(order: np.ndarray, options: PlanOptions, epoch: int, lengths: np.ndarray) -> np.ndarray:
    """records_SG: an order cut into steps, tail padded or dropped, and bucketed by length where that is asked for."""
    order = order[: options.limit or None]  # before anything is sorted: which records count must not depend on G
    steps, size = num_steps(len(order), options), options.global_batch_size
    records_SG = np.full((steps, size), PAD, np.int64)
    used = min(len(order), steps * size)
    records_SG.ravel()[:used] = order[:used]
    if options.bucket_steps < 2:
        return records_SG
    whole = used // size  # a padded last step stays where it is
    for number, first in enumerate(range(0, whole, options.bucket_steps)):
        window = records_SG[first : min(first + options.bucket_steps, whole)]
        flat = window.ravel()
        by_length = flat[np.argsort(lengths[flat], kind="stable")].reshape(window.shape)
        window[:] = generator(options.seed, epoch, 3, number).permutation(by_length)  # short and long steps mixed
    return records_SG


def deal_step(
    records_G: np.ndarray, lengths: np.ndarray, *, rank: int, world_size: int, sizes: np.ndarray
) -> list[np.ndarray]:
    """This rank's micro-batches of one step. ``sizes`` [A] from ``micro_sizes`` sum to G / world_size.

    The step is sorted by length first and each micro-batch is cut across all ranks at once: little padding, and all
    ranks work on like lengths at the same time.
    """
    by_length = _longest_first(records_G, lengths)
    ends = np.cumsum(sizes) * world_size
    return [by_length[end - size * world_size + rank : end : world_size] for end, size in zip(ends, sizes, strict=True)]


def _longest_first(records_G: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Longest first (memory peaks at once, not late), empty slots last; ties by place in the step."""
    keys = np.where(records_G == PAD, -1, lengths[np.maximum(records_G, 0)].astype(np.int64))
    return records_G[np.argsort(-keys, kind="stable")]


def micro_sizes(
    records_G: np.ndarray, lengths: np.ndarray, *, world_size: int, micro_batch_size: int, balance: bool
) -> np.ndarray:
    """sizes_A: samples a rank takes in each micro-batch of a step, the same on all ranks.

    Equal sizes, or with ``balance`` sizes under one token budget: long records stand in small micro-batches, short ones
    in large ones, and the number of micro-batches is as with equal sizes. The budget is the least that does it.
    """
    a = len(records_G) // world_size // micro_batch_size
    if not balance or a == 1:
        return np.full(a, micro_batch_size)
    by_length = _longest_first(records_G, lengths)
    longest = np.where(by_length == PAD, 1, lengths[np.maximum(by_length, 0)].astype(np.int64) + 1)[::world_size]
    low, high = int(longest[0]), int(longest[0]) * len(longest)
    while low < high:  # bisection on the budget: the greedy cut needs fewer micro-batches the larger it is
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(longest, middle)) <= a else (middle + 1, high)
    sizes = _cut(longest, low)
    while len(sizes) < a:  # a smaller budget needs more than A, this one fewer: halve the largest
        big = int(np.argmax(sizes))
        sizes[big : big + 1] = [sizes[big] - sizes[big] // 2, sizes[big] // 2]
    return np.array(sizes)


def _cut(longest: np.ndarray, budget: int) -> list[int]:
    """Greedy cut of lengths in falling order into runs with (first length) x (number) <= budget."""
    sizes, i = [], 0
    while i < len(longest):
        size = min(max(1, budget // int(longest[i])), len(longest) - i)
        sizes.append(size)
        i += size
    return sizes
