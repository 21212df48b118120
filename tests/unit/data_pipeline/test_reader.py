"""Every pair once, the same steps for any ranks, workers, micro-batches and interruptions."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.reader import PairLoader, open_dataset
from data_pipeline.shard_builder import BuildOptions, build

LARGEST = 97


class Corpora(dict):
    """Number of records, 1 to LARGEST → data set in shards of 10."""

    def __init__(self, folder):
        super().__init__()
        self.shards = folder / "shards"
        rows = [
            {"id": f"r{i}", "prompt": f"q{i}", "chosen": "a" * (i % 13 + 1), "rejected": "b" * (i % 7 + 1)}
            for i in range(LARGEST)
        ]
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        build([str(path)], self.shards, BuildOptions(shard_size=10))

    def __missing__(self, count):
        self[count] = open_dataset(str(self.shards), max_records=count)
        return self[count]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return Corpora(tmp_path_factory.mktemp("corpora"))


def loaders(dataset, encoder, world_size, **options):
    return [PairLoader(dataset, encoder, rank=r, world_size=world_size, **options) for r in range(world_size)]


def take_steps(ranks, count):
    """{(epoch, step): sorted ids} of ``count`` global steps taken by all ranks together."""
    streams = [loader.steps() for loader in ranks]
    taken = {}
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        places = {(batch.epoch, batch.step) for batches in parts for batch in batches}
        assert len(places) == 1, "ranks disagree on the step"
        assert [len(batches) for batches in parts] == [ranks[0].micro_batches] * len(ranks)
        for micro in zip(*parts, strict=True):
            assert len({len(batch.ids) for batch in micro}) == 1, "ranks disagree on the size of a micro-batch"
        taken[places.pop()] = sorted(i for batches in parts for batch in batches for i in batch.ids)
    return taken


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.integers(1, LARGEST),
    world_size=st.integers(1, 8),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    tail=st.sampled_from(["pad", "drop"]),
    batching=st.sampled_from(["equal", "balanced"]),
    bucket_steps=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_interruption_and_world_size_gives_the_uninterrupted_order(
    corpora, tokenizer, records, world_size, micro, accumulation, tail, batching, bucket_steps, seed, data
):
    dataset, encoder, size = corpora[records], Encoder(tokenizer), world_size * micro * accumulation
    order = {"seed": seed, "global_batch_size": size, "tail": tail, "bucket_steps": bucket_steps}
    if tail == "drop" and records < size:
        with pytest.raises(DataError, match="do not fill a step"):
            PairLoader(dataset, encoder, micro_batch_size=micro, **order)
        return
    whole = loaders(dataset, encoder, 1, micro_batch_size=size, **order)
    epoch = len(whole[0])
    expected = take_steps(whole, 2 * epoch)

    first = data.draw(st.integers(0, 2 * epoch))
    ranks = loaders(dataset, encoder, world_size, micro_batch_size=micro, batching=batching, **order)
    taken = take_steps(ranks, first)
    state = json.loads(json.dumps(ranks[-1].state_dict()))
    divisors = [w for w in range(1, 9) if size % w == 0]
    other = loaders(dataset, encoder, data.draw(st.sampled_from(divisors)), micro_batch_size=1, **order)
    for loader in other:
        loader.load_state_dict(state)
    taken |= take_steps(other, 2 * epoch - first)

    assert taken == expected
    for number in (0, 1):
        ids = [i for (e, _), step in taken.items() if e == number for i in step if i]
        assert len(ids) == len(set(ids))
        assert len(ids) == (records if tail == "pad" else epoch * size)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.integers(1, LARGEST),
    size=st.sampled_from([8, 12]),
    seed=st.integers(0, 2**31),
    shuffle_shards=st.sampled_from([0, 2]),
    data=st.data(),
)
def test_any_interruption_with_other_workers_before_and_after(
    corpora, tokenizer, records, size, seed, shuffle_shards, data
):
    """The ranks run one after the other here, which a real run's do not: few processes at a time, the same order."""
    dataset, encoder = corpora[records], Encoder(tokenizer)
    order = {"seed": seed, "global_batch_size": size, "shuffle_shards": shuffle_shards}
    expected = take_steps(loaders(dataset, encoder, 1, micro_batch_size=size, **order), 4)
    ways = [w for w in range(1, 9) if size % w == 0]
    first, state, taken = data.draw(st.integers(0, 4)), None, {}
    for begin, end in ((0, first), (first, 4)):
        world_size, workers = data.draw(st.sampled_from(ways)), data.draw(st.integers(0, 3))
        for loader in loaders(dataset, encoder, world_size, micro_batch_size=1, num_workers=workers, **order):
            if state:
                loader.load_state_dict(state)
            steps = loader.steps()
            for _ in range(begin, end):
                for batch in next(steps):
                    taken.setdefault((batch.epoch, batch.step), []).extend(batch.ids)
            loader.close()
        state = loader.state_dict()
    assert {place: sorted(ids) for place, ids in taken.items()} == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 4])
def test_workers_change_nothing(corpora, tokenizer, workers, world_size):
    options = {"seed": 5, "global_batch_size": 16, "micro_batch_size": 2, "world_size": world_size, "rank": 0}
    plain, worked = (
        PairLoader(corpora[97], Encoder(tokenizer), num_workers=n, prefetch=2, **options) for n in (0, workers)
    )
    pairs = list(zip(plain, worked, strict=True))
    assert len(pairs) == 7 * 8 // world_size
    for a, b in pairs:
        assert (a.ids, a.step, a.micro, a.last_micro) == (b.ids, b.step, b.micro, b.last_micro)
        assert torch.equal(a.input_ids_B2T, b.input_ids_B2T)
    assert worked.state_dict() == plain.state_dict()
    worked.close()


def test_epoch_loop_and_state(corpora, tokenizer):
    loader = PairLoader(corpora[23], Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2)
    assert len(loader) == 6
    first = [batch.ids for batch in loader]
    assert (loader.epoch, loader.step) == (1, 0)
    second = [batch.ids for batch in loader]
    assert sorted(sum(first, ())) == sorted(sum(second, ()))
    assert first != second
    assert len(json.dumps(loader.state_dict())) < 400


def test_a_step_left_half_way_is_given_again(corpora, tokenizer):
    loader = PairLoader(corpora[23], Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2)
    for batch in loader:
        if batch.step == 2 and not batch.last_micro:
            break
    assert loader.state_dict()["step"] == 2
    again = next(iter(loader))
    assert (again.step, again.micro, again.ids) == (2, 0, batch.ids)


def test_a_load_under_a_running_iterator_takes_effect(corpora, tokenizer):
    loader = PairLoader(corpora[23], Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=4)
    steps = loader.steps()
    state = loader.state_dict()
    first = [next(steps)[0].ids for _ in range(8)]
    assert (loader.epoch, loader.step) == (1, 2)
    loader.load_state_dict(state)
    assert [next(steps)[0].ids for _ in range(8)] == first


def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next(corpora, tokenizer):
    options = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 4}
    loader = PairLoader(corpora[7], Encoder(tokenizer), **options)
    for batch in loader:
        if batch.step == len(loader) - 1:
            state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    resumed = PairLoader(corpora[7], Encoder(tokenizer), **options)
    resumed.load_state_dict(state)
    assert [b.ids for b in resumed] == [b.ids for b in loader]


@pytest.mark.parametrize("change", [{"seed": 2}, {"global_batch_size": 8}, {"tail": "drop"}, {"bucket_steps": 2}])
def test_a_state_of_another_order_is_refused(corpora, tokenizer, change):
    options = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 2}
    state = PairLoader(corpora[23], Encoder(tokenizer), **options).state_dict()
    with pytest.raises(DataError, match=next(iter(change))):
        PairLoader(corpora[23], Encoder(tokenizer), **(options | change)).load_state_dict(state)
    with pytest.raises(DataError, match="the data are not those"):
        PairLoader(corpora[60], Encoder(tokenizer), **options).load_state_dict(state)
    with pytest.raises(DataError, match="has no"):
        PairLoader(corpora[23], Encoder(tokenizer), **options).load_state_dict({"step": 3})


@pytest.fixture
def shardings(tmp_path, jsonl, make_rows):
    """{records a shard: a data set of the same 60 records in the same order}."""
    source = str(jsonl(tmp_path / "a.jsonl", make_rows(60)))
    for size in (4, 5, 30):
        build([source], tmp_path / str(size), BuildOptions(shard_size=size))
    return {size: open_dataset(str(tmp_path / str(size))) for size in (4, 5, 30)}


def test_a_state_of_another_sharding_is_refused_where_the_order_depends_on_it(shardings, tokenizer):
    def loader(size, **options):
        return PairLoader(
            shardings[size], Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=4, **options
        )

    assert shardings[4].fingerprint == shardings[5].fingerprint
    grouped = loader(4, shuffle_shards=3).state_dict()
    with pytest.raises(DataError, match="other shards, on which their order depends"):
        loader(5, shuffle_shards=3).load_state_dict(grouped)
    loader(4, shuffle_shards=3).load_state_dict(grouped)
    for size in (5, 30):
        loader(size).load_state_dict(loader(4).state_dict())  # shuffled whole: whatever the shards
    loader(30, shuffle_shards=99).load_state_dict(loader(4, shuffle_shards=99).state_dict())  # one group is all


def test_a_resumed_loader_goes_on_with_the_groups_it_began_with(shardings, tokenizer):
    """Remote shards are shuffled in groups by default, local ones are not; a run may be resumed on a local copy."""
    options = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 4}
    begun = PairLoader(shardings[4], Encoder(tokenizer), shuffle_shards=3, **options)
    steps = begun.steps()
    next(steps)
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = PairLoader(shardings[4], Encoder(tokenizer), **options)
    next(resumed.steps())  # in another order
    resumed.load_state_dict(state)
    assert [b.ids for b in resumed] == [next(steps)[0].ids for _ in range(14)]
    with pytest.raises(DataError, match="shuffle_shards was 3 and is 2"):
        PairLoader(shardings[4], Encoder(tokenizer), shuffle_shards=2, **options).load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"micro_batch_size": 3},
        {"world_size": 3, "rank": 0},
        {"rank": 1},
        {"num_workers": -1},
        {"batching": "tokens"},
        {"tail": "keep"},
        {"max_fault_fraction": 2.0},
        {"seed": -1},
        {"micro_batch_size": 0},
        {"global_batch_size": 0},
    ],
)
def test_wrong_options_are_named(corpora, tokenizer, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        PairLoader(
            corpora[23], Encoder(tokenizer), **({"seed": 1, "global_batch_size": 4, "micro_batch_size": 2} | wrong)
        )


def test_counts_are_summed_over_ranks_once(corpora, tokenizer):
    """The counts before a resume are those of all ranks: they must not be summed again."""
    options = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 2}
    ranks = loaders(corpora[23], Encoder(tokenizer), 2, **options)
    take_steps(ranks, 3)
    for number, loader in enumerate(ranks):
        loader.faults["changed_record"] += number + 1

    def total(name, ranks):
        parts = []
        for loader in ranks:
            loader.totals(lambda numbers: parts.append(numbers) or numbers)
        summed = [sum(column) for column in zip(*parts, strict=True)]
        return ranks[0].state_dict(lambda _: summed)[name]

    assert total("faults", ranks) == {"changed_record": 3}
    assert total("seen", ranks) == 12
    resumed = loaders(corpora[23], Encoder(tokenizer), 2, **options)
    for loader in resumed:
        loader.load_state_dict(ranks[0].state_dict(lambda local: [12, 0, 0, 0, 3, *local[5:]]))
    assert total("faults", resumed) == {"changed_record": 3}
    take_steps(resumed, 1)
    assert total("seen", resumed) == 16


def test_the_summary_says_what_was_cut_and_left_out(tmp_path, jsonl, tokenizer):
    pairs = [("q", "a", "b"), ("q2", "x" * 30, "y"), ("q3 " + "long" * 9, "a", "b"), ("q4", "<mask>", "c")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    dataset = open_dataset(str(jsonl(tmp_path / "a.jsonl", rows)), cache_dir=tmp_path / "cache")
    options = {"seed": 1, "global_batch_size": 3, "micro_batch_size": 3}  # two steps, two empty slots
    loader = PairLoader(dataset, Encoder(tokenizer, max_length=20, truncation="drop"), **options)
    assert loader.summary() == ""
    list(loader)
    first = "of 4 records: 2 left out (over_long_prompt 1, special_token 1), 1 cut to fit max_length 20"
    assert loader.summary() == first
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = PairLoader(dataset, Encoder(tokenizer, max_length=20, truncation="drop"), **options)
    resumed.load_state_dict(state)
    assert resumed.summary() == first, "counts go on after a resume"
    list(resumed)
    assert resumed.totals() == {
        "seen": 8,
        "truncated": 2,
        "faults": {},
        "dropped": {"over_long_prompt": 2, "special_token": 2},
    }
    assert loader.summary(lambda numbers: [2 * n for n in numbers]).startswith("of 8 records: 4 left out")
