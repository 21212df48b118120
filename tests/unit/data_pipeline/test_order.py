"""The order as arrays: complete, well shuffled, mixed in proportion, dealt without overlap."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.order import (
    PAD,
    PlanOptions,
    as_steps,
    deal_step,
    micro_sizes,
    mixed_records,
    num_steps,
    shares,
    shuffled_records,
    take_share,
)
from data_pipeline.reader import PairLoader


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 99), st.integers(0, 3))
def test_every_record_once(counts, group, seed, epoch):
    options = PlanOptions(seed, 4, shuffle_shards=group)
    order = shuffled_records(counts, options, epoch)
    assert sorted(order) == list(range(sum(counts)))


def test_groups_bound_the_shards_read_at_a_time():
    counts, options = [50] * 12, PlanOptions(1, 4, shuffle_shards=3)
    shard = shuffled_records(counts, options, 0) // 50
    assert all(len(set(shard[i : i + 150])) == 3 for i in range(0, 600, 150))


def test_epochs_and_seeds_differ_and_repeat():
    one, again, other, next_epoch = (
        shuffled_records([100], PlanOptions(seed, 4), epoch) for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, next_epoch)


def test_shuffle_quality():
    """A corpus sorted by length, the worst case: means of batches scatter as those of a true permutation do."""
    size, batch = 64_000, 32
    order = shuffled_records([1000] * 64, PlanOptions(7, batch), 0)
    means = order.reshape(-1, batch).mean(1)
    ideal = size / np.sqrt(12 * batch)
    assert 0.93 < means.std() / ideal < 1.07
    neighbours = [np.sum(np.diff(np.sort(row)) < 100) for row in order.reshape(-1, batch)]
    expected = (batch - 1) * (1 - (1 - 100 / size) ** batch)
    assert abs(np.mean(neighbours) - expected) < 0.2 * expected


@given(st.integers(1, 50), st.integers(1, 12), st.sampled_from(["pad", "drop"]), st.sampled_from([0, 2, 5]))
def test_steps(records, size, tail, bucket):
    options = PlanOptions(3, size, tail, bucket_steps=bucket)
    lengths = np.arange(records)[::-1]
    steps = as_steps(np.random.default_rng(0).permutation(records), options, 0, lengths)
    assert steps.shape == (num_steps(records, options), size)
    kept = steps[steps != PAD]
    assert len(kept) == len(set(kept.tolist())) == (records if tail == "pad" else records // size * size)


def test_buckets_bring_like_lengths_together():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 4096)
    spread = []
    for bucket in (0, 16):
        steps = as_steps(rng.permutation(4096), PlanOptions(0, 32, bucket_steps=bucket), 0, lengths)
        spread.append(np.mean(lengths[steps].max(1) - lengths[steps].min(1)))
    assert spread[1] < spread[0] / 8


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.data())
def test_dealing_is_a_partition_and_the_ranks_agree(world, micro, accumulation, balance, data):
    size = world * micro * accumulation
    lengths = np.array(data.draw(st.lists(st.integers(1, 500), min_size=size, max_size=size)))
    records = np.arange(size)
    records[size - data.draw(st.integers(0, size)) :] = PAD
    sizes = micro_sizes(records, lengths, world_size=world, micro_batch_size=micro, balance=balance)
    assert len(sizes) == accumulation and sizes.sum() == size // world and sizes.min() >= 1
    dealt = [deal_step(records, lengths, rank=r, world_size=world, sizes=sizes) for r in range(world)]
    assert [[len(part) for part in mine] for mine in dealt] == [sizes.tolist()] * world
    everything = sorted(int(i) for mine in dealt for part in mine for i in part)
    assert everything == sorted(records.tolist())


def test_balanced_micro_batches_hold_like_numbers_of_tokens():
    lengths = np.array([1000] * 2 + [100] * 30)
    records = np.arange(32)

    def worst(balance):
        sizes = micro_sizes(records, lengths, world_size=1, micro_batch_size=8, balance=balance)
        parts = deal_step(records, lengths, rank=0, world_size=1, sizes=sizes)
        return max(len(part) * lengths[part].max() for part in parts)

    assert worst(False) == 8000
    assert worst(True) <= 2100


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_mixing_keeps_shares_and_uses_every_record_alike(sizes, data):
    weights = data.draw(st.lists(st.floats(0.05, 5), min_size=len(sizes), max_size=len(sizes)))
    counts = shares(sizes, weights)
    assert counts.sum() == sum(sizes)
    assert np.all(np.abs(counts - np.array(weights) / sum(weights) * sum(sizes)) < 1)
    met = np.zeros(sum(sizes), int)
    starts = np.cumsum([0, *sizes])
    for epoch in range(4):
        order = mixed_records(sizes, weights, PlanOptions(1, 4), epoch)
        met += np.bincount(order, minlength=sum(sizes))
        assert [np.sum((order >= a) & (order < b)) for a, b in pairwise(starts)] == counts.tolist()
    for a, b in pairwise(starts):
        assert met[a:b].max() - met[a:b].min() <= 1


def test_mixed_sources_stand_among_each_other():
    order = mixed_records([500, 500], [1, 1], PlanOptions(3, 4), 0)
    first = np.sum(order[:200] < 500)
    assert 60 < first < 140  # ten standard deviations either side of 100


def test_a_source_without_weight_is_not_read():
    assert len(take_share(5, 0, seed=0, source=0, epoch=0)) == 0
    assert set(mixed_records([4, 4], [0, 1], PlanOptions(0, 2), 0)) == {4, 5, 6, 7}


def test_a_source_without_weight_is_not_counted(tmp_path, jsonl, make_rows, cache):
    """It has had its say on what is held out, though: a prompt held out there is not trained on elsewhere."""
    small = str(jsonl(tmp_path / "small.jsonl", make_rows(10)))
    large = str(jsonl(tmp_path / "large.jsonl", make_rows(30)))  # holds the prompts of the small one too
    for weights, count in (([0, 1], 30), ([1, 0], 10), ([2, 1], 40)):
        assert len(open_dataset([small, large], weights=weights, cache_dir=cache)) == count
    options = {"eval_fraction": 0.3, "cache_dir": cache}
    train = open_dataset([small, large], weights=[1, 0], **options)
    held_out = open_dataset([small, large], split="eval", **options)
    assert not np.isin(train.parts[0].column("prompt"), held_out.parts[0].column("prompt")).any()


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 12), st.integers(1, 60))
def test_a_limit_takes_the_first_of_the_order_whatever_the_step(records, size, other, limit):
    lengths, order = np.arange(records)[::-1], np.random.default_rng(1).permutation(records)
    found = []
    for batch in (size, other):
        options = PlanOptions(3, batch, limit=limit)
        steps = as_steps(order, options, 0, lengths)
        assert len(steps) == num_steps(records, options)
        found.append(sorted(steps[steps != PAD].tolist()))
    assert found[0] == found[1] == sorted(order[:limit].tolist())


def test_mixing_in_the_loader(tmp_path, jsonl, make_rows, cache, tokenizer):
    small = str(jsonl(tmp_path / "small.jsonl", make_rows(10)))
    large = str(jsonl(tmp_path / "large.jsonl", make_rows(30)))  # ids r0 .. r9 stand in both
    dataset = open_dataset([small, large], weights=[1, 1], cache_dir=cache)
    options = {"seed": 2, "global_batch_size": 8, "micro_batch_size": 4}
    loader = PairLoader(dataset, Encoder(tokenizer), **options)
    names = [name for batch in loader for name in batch.ids]
    assert sum(name.startswith("0/") for name in names) == sum(name.startswith("1/") for name in names) == 20
    resumed = PairLoader(dataset, Encoder(tokenizer), **options)
    resumed.load_state_dict(loader.state_dict())
    assert [b.ids for b in resumed] == [b.ids for b in loader]
    unmixed = open_dataset([small, large], cache_dir=cache)
    everything = [n for b in PairLoader(unmixed, Encoder(tokenizer), **options) for n in b.ids]
    assert len(set(everything)) == len(everything) == 40
    assert unmixed.fingerprint != dataset.fingerprint
    with pytest.raises(DataError, match="shuffle_shards"):
        PairLoader(dataset, Encoder(tokenizer), shuffle_shards=2, **options)
    tiny = str(jsonl(tmp_path / "tiny.jsonl", make_rows(1)))
    with pytest.raises(DataError, match=r"tiny\.jsonl: no record is left on the (train|eval) side"):
        for side in ("train", "eval"):  # its one prompt is on one side only
            open_dataset([tiny, large], weights=[1, 1], eval_fraction=0.5, split=side, cache_dir=cache)
    for wrong in ([1], [0, 0], [-1, 2]):
        with pytest.raises(DataError, match="weights"):
            open_dataset([small, large], weights=wrong, cache_dir=cache)


def test_a_million_records_are_planned_without_much_memory():
    options = PlanOptions(0, 512)
    order = shuffled_records([10_000] * 100, options, 0)
    steps = as_steps(order, options, 0, np.zeros(1_000_000, np.uint32))
    assert steps.nbytes + order.nbytes < 17e6
