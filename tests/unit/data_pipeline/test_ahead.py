"""Working ahead changes neither order nor errors, takes no more than it may, and ends when nobody wants it."""

import gc
import subprocess
import sys
import threading

import pytest

from data_pipeline.ahead import Ahead
from data_pipeline.dataset import open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.reader import PairLoader


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "data ahead"]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_order_and_end(depth):
    ahead = Ahead(iter(range(20)), depth)
    assert list(ahead) == list(range(20))
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_comes_in_its_place_as_it_was():
    def items():
        yield from range(3)
        raise DataError("the fourth")

    ahead, got = Ahead(items(), 10), []
    with pytest.raises(DataError, match="the fourth") as caught:
        for item in ahead:
            got.append(item)
    assert got == [0, 1, 2]
    assert "items" in [entry.name for entry in caught.traceback], "the place where it was raised is shown"


def test_no_more_than_depth_is_made_ahead_and_closing_closes_the_source():
    made, reached, closed = [], threading.Event(), threading.Event()

    def items():
        try:
            for number in range(1000):
                made.append(number)
                if number == 3:
                    reached.set()
                yield number
        finally:
            closed.set()

    ahead = Ahead(items(), 2)
    assert next(ahead) == 0
    assert reached.wait(30)  # 0 is consumed, 1 and 2 are ready, 3 waits for room
    assert made == [0, 1, 2, 3]
    ahead.close()
    assert closed.wait(30) and made == [0, 1, 2, 3]
    assert next(ahead, None) is None


def test_the_thread_goes_with_its_object():
    others = threads()  # left by whatever ran before in this process: they may end at any moment
    ahead = Ahead(iter(int, 1), 2)  # endless
    assert next(ahead) == 0
    (thread,) = [thread for thread in threads() if thread not in others]
    del ahead
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_an_interpreter_ends_although_a_thread_is_at_work():
    script = "from data_pipeline.ahead import Ahead; kept = Ahead(iter(int, 1), 2); print(next(kept))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.fixture
def dataset(tmp_path, jsonl, make_rows, cache):
    return open_dataset(str(jsonl(tmp_path / "a.jsonl", make_rows(24))), cache_dir=cache)


def test_what_is_made_ahead_is_in_no_count_and_no_state(dataset, tokenizer):
    loader = PairLoader(dataset, Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2, prefetch=50)
    steps = loader.steps()
    next(steps)
    assert (loader.seen, loader.state_dict()["step"], loader.totals()["seen"]) == (4, 1, 4)
    loader.close()
    again = PairLoader(dataset, Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2)
    again.load_state_dict(loader.state_dict())
    assert [batch.ids for batch in next(steps)] == [batch.ids for batch in next(again.steps())]


def test_after_an_error_the_same_batch_is_met_again(dataset, tokenizer):
    class Refusing(Encoder):
        def encode_many(self, records):
            if any(record.id == "r7" for record in records):
                raise DataError("not r7")
            return super().encode_many(records)

    loader = PairLoader(dataset, Refusing(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2)
    seen = []
    for _ in range(2):
        with pytest.raises(DataError, match="not r7"):
            for batch in loader:
                seen += batch.ids
        assert "r7" not in seen
    state = loader.state_dict()
    whole = PairLoader(dataset, Encoder(tokenizer), seed=1, global_batch_size=4, micro_batch_size=2)
    whole.load_state_dict(state)
    assert "r7" in [name for batch in next(whole.steps()) for name in batch.ids]
