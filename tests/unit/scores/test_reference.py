"""Reference scores that are kept: asked for once a batch, the same numbers, made anew when rows are cut otherwise."""

import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.reference import remembered
from diffdpo.scores.segments import Segments, Size


def batch_of(name: str, *, step: int):
    answers = [TokenAnswer(torch.arange(5, 5 + length).numpy().astype("int32"), 2) for length in (6, 7)]
    return collate([TokenPair(name, *answers)], pad_id=0, epoch=0, step=step, micro=0, last_micro=True)


@pytest.fixture
def counted():
    """A reference that counts how often it is asked."""

    def reference(rows, batch):
        reference.calls += 1
        return torch.full((len(rows),), -float(reference.calls))

    reference.calls = 0
    return reference


def test_asked_once_for_each_batch(counted):
    noise, segments = NoiseOptions("mask_count", 2, 0, 4), Segments(rows=4)
    reference = remembered(counted, segments)
    batches = [batch_of("a", step=0), batch_of("b", step=1), batch_of("a/mismatched", step=0)]
    rows = [noise.draw_rows(batch, torch.device("cpu")) for batch in batches]
    first = [reference(*each) for each in zip(rows, batches, strict=True)]
    again = [reference(*each) for each in zip(rows, batches, strict=True)]
    assert counted.calls == 3 and all(map(torch.equal, first, again))
    assert len({float(f_R[0]) for f_R in first}) == 3, "one batch's scores are not another's"


def test_made_anew_in_smaller_segments(counted):
    noise, segments = NoiseOptions("mask_count", 2, 0, 4), Segments(rows=4)
    reference, batch = remembered(counted, segments), batch_of("a", step=0)
    rows = noise.draw_rows(batch, torch.device("cpu"))
    reference(rows, batch)
    assert segments.halve(Size(4, 28))
    reference(rows, batch)
    assert counted.calls == 2
