"""Padding answers with terminators: which, how far, and what stays."""

import torch

from data_pipeline.batch import PairBatch
from diffdpo.training.answer_canvas import fill_canvas

END = 9


def batch(count: int) -> PairBatch:
    """Prompt of 2, answer of 2 and a terminator; the last record's answer was cut and has none."""
    ids = torch.tensor([[[1, 2, 3, 4, END], [0] * 5]] * count)
    ids[-1, 0, -1] = 5
    lengths, prompts = torch.tensor([[5, 0]] * count), torch.tensor([[2, 0]] * count)
    return PairBatch(ids, lengths, prompts, (lengths > 0).float(), tuple(map(str, range(count))), 0, 0, 0, True)


def test_half_are_filled_to_the_canvas_and_the_rest_untouched():
    before = batch(400)
    after = fill_canvas(before, canvas=8, terminator_id=END, seed=0)
    lengths = after.lengths_B2[:, 0]
    filled = lengths == 10
    assert set(lengths.tolist()) == {5, 10} and 150 < int(filled.sum()) < 250
    assert torch.equal(after.input_ids_B2T[:, :, :5][:, 0], before.input_ids_B2T[:, 0])
    assert (after.input_ids_B2T[filled][:, 0, 5:] == END).all()
    assert lengths[-1] == 5, "an answer that was cut must not learn to end there"


def test_a_function_of_the_record_alone():
    whole = fill_canvas(batch(50), canvas=8, terminator_id=END, seed=3).lengths_B2
    again = fill_canvas(batch(50), canvas=8, terminator_id=END, seed=3).lengths_B2
    other = fill_canvas(batch(50), canvas=8, terminator_id=END, seed=4).lengths_B2
    assert torch.equal(whole, again) and not torch.equal(whole, other)
