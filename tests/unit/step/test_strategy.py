"""``--segmentation auto`` explains itself, and what cannot work is refused with the way that does."""

from dataclasses import replace

import pytest

from diffdpo.errors import UserError
from diffdpo.scores.segments import Segments
from diffdpo.step.strategy import MicroBatchShape, choose_strategy

SHAPE = MicroBatchShape(pairs=8, rows_per_answer=4, max_length=100, couples_pairs=False)


def chosen(name="auto", obstacle=None, leaves=False, tokens=1000, shape=SHAPE, few=False):
    segments = Segments(tokens=tokens)
    how = {"obstacle": obstacle, "reduces_in_backward": leaves, "segments": segments, "shape": shape}
    return choose_strategy(name, **how, few=few)


def test_auto_names_its_reason():
    assert chosen(tokens=6400) == ("none", "all 64 rows of a micro-batch fit in one segment")
    assert chosen()[0] == "checkpoint"
    assert chosen(obstacle="sharded", leaves=True) == (
        "two_pass",
        "gradients leave the device after each segment; checkpoint would hold them to the end",
    )
    assert chosen(shape=replace(SHAPE, rows_per_answer=16)) == (
        "deferred",
        "the rows of one answer fill a segment, so no row needs a second forward",
    )
    assert chosen(obstacle="sharded", shape=replace(SHAPE, rows_per_answer=16))[0] == "checkpoint"
    assert chosen(shape=replace(SHAPE, couples_pairs=True)) == ("two_pass", "the loss couples the pairs of a step")


@pytest.mark.parametrize("name", ["none", "checkpoint", "deferred"])
def test_a_loss_of_the_whole_batch_needs_two_passes(name):
    with pytest.raises(UserError, match="two_pass"):
        chosen(name, shape=replace(SHAPE, couples_pairs=True))


def test_deferred_is_refused_where_it_would_undo_the_sharding():
    with pytest.raises(UserError, match=r"^--segmentation deferred: would undo; use --segmentation two_pass or auto$"):
        chosen("deferred", obstacle="would undo")
    assert chosen("deferred") == ("deferred", "as asked for")


def test_an_adapter_defers_where_an_answer_fills_half_a_segment():
    assert chosen(tokens=700, few=True)[0] == "deferred"  # of 4 rows of 100 tokens, twice
    assert chosen(tokens=800, few=True)[0] == "checkpoint"
    assert chosen(tokens=700)[0] == "checkpoint"
    assert chosen(tokens=700, few=True, obstacle="sharded", leaves=True)[0] == "two_pass"
