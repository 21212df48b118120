"""``--sequence_parallel_size``: what it implies, and where it is refused."""

import pytest

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.choice import choose_engine
from diffdpo.errors import UserError
from diffdpo.scores.segments import Segments, make_segments
from diffdpo.settings.segments import SegmentSettings
from tests.support.steps import WORLD


def chosen(processes: int, **flags):
    config = make_config(TrainConfig, {"sequence_parallel_size": 2, "learning_rate": 1e-3, **flags})
    return choose_engine(config, processes=processes, cuda=False, bf16_able=False)


def test_forwards_are_collectives_and_weights_are_whole():
    choice = chosen(4)
    assert choice.meets_in_forwards and not choice.shards_parameters
    assert "wait for one another" in choice.retry_obstacle(None) and "share its rows" in choice.no_sync_obstacle(
        few=True
    )
    assert "rows over 2" in choice.describe()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"engine": "fsdp2"}, "this run is under FSDP2"),
        ({"ds_config": "zero2"}, "this run is under DeepSpeed"),
        ({"torch_compile": True}, "--torch_compile has not been seen to work with --sequence_parallel_size"),
        ({}, "2 does not divide the 3 process"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, told):
    with pytest.raises(UserError, match=told):
        chosen(3, **flags)


def test_processes_take_turns():
    """Each has its segments while the other has nothing of its own; a forward of a group may be larger."""
    for index in (0, 1):
        segments = Segments(rows=1, turns=(index, 2))
        before, after = segments._fillers(3)
        assert (before, after) == ((0, 3), (3, 0))[index]
    alone, shared = (
        make_segments(SegmentSettings(), chosen(2, sequence_parallel_size=n), WORLD.device) for n in (1, 2)
    )
    assert shared.tokens == 2 * alone.tokens
