"""Cutting rows into forwards."""

import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.rows import NoisyRows, noisy_rows
from diffdpo.scores.segments import Segments, in_order


class Pretend:
    """A world in which another rank needs ``most`` segments."""

    def __init__(self, most: int):
        self.most = most

    def all_reduce_max(self, number: int) -> int:
        return max(number, self.most)


def rows_of(lengths: list[tuple[int, int]], n: int = 2) -> NoisyRows:
    """Noisy rows of pairs whose answers have these lengths, after a prompt of 2 tokens."""
    ids = torch.arange(3, 200, dtype=torch.int32).numpy()
    pairs = [
        TokenPair(f"r{i}", *(TokenAnswer(ids[: 2 + length], 2) if length else None for length in both))
        for i, both in enumerate(lengths)
    ]
    batch = collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    return noisy_rows(batch, estimator="mask_count", num_samples=n, seed=0, mask_token_id=1)


def pretend_scores(rows: NoisyRows) -> torch.Tensor:
    """A number for each row made of all that its scored positions say."""
    value_M = rows.input_ids_RT[rows.row_M, rows.position_M] + 7 * rows.target_M + rows.position_M
    return torch.zeros(len(rows), dtype=torch.long).index_add(0, rows.row_M, value_M) + rows.lengths_R


def test_rows_come_back_in_order_whatever_the_cut():
    rows = rows_of([(5, 9), (30, 2), (0, 4), (9, 9)])
    for segments in (Segments(), Segments(rows=3), Segments(tokens=40), Segments(tokens=1), Segments(rows=100)):
        pieces = segments(rows)
        assert torch.equal(in_order(pieces, [pretend_scores(piece.rows) for piece in pieces]), pretend_scores(rows))
        for piece in pieces:
            assert torch.equal(piece.of(rows.weight_R), piece.rows.weight_R)


def test_segments_hold_a_number_of_tokens_and_rows_alike():
    rows = rows_of([(5, 9), (30, 2), (0, 4), (9, 9)])
    pieces = Segments(tokens=40)(rows)
    tokens = [int(piece.rows.lengths_R.sum()) for piece in pieces]
    assert all(each <= 40 for each in tokens) and sum(tokens) == int(rows.lengths_R.sum())
    assert pieces[0].rows.lengths_R.tolist() == [32], "the longest first: what runs out of memory does so at once"
    lengths = torch.cat([piece.rows.lengths_R for piece in pieces])
    assert torch.equal(lengths, lengths.sort(descending=True).values)


def test_ranks_cut_into_equally_many():
    rows = rows_of([(5, 9), (30, 2)])
    own = Segments(rows=3)(rows)
    for make in (lambda s: s(rows), lambda s: [piece for answer in s.by_answer(rows) for piece in answer]):
        pieces = make(Segments(rows=3, equal_over=Pretend(9)))  # type: ignore[arg-type]
        assert len(own) < len(pieces) == 9
        values = [torch.ones(len(piece.rows)) for piece in pieces]
        assert len(in_order(pieces, values)) == len(rows)
        fill = pieces[-1]
        assert len(fill.rows) == 1 and len(fill.rows.row_M) == 0 and fill.of(torch.ones(len(rows))).tolist() == [0.0]


def test_by_answer_keeps_answers_apart():
    rows = rows_of([(5, 9), (30, 0)], n=5)
    answers = Segments(rows=2).by_answer(rows)
    assert [len(pieces) for pieces in answers] == [3, 3, 3, 3]
    for answer, pieces in enumerate(answers):
        assert {a for piece in pieces for a in piece.rows.answer_R.tolist()} == {answer}
    flat = [piece for pieces in answers for piece in pieces]
    assert torch.equal(in_order(flat, [pretend_scores(piece.rows) for piece in flat]), pretend_scores(rows))


def test_segments_have_about_as_many_masked_tokens():
    """Their logits are what a segment of few rows needs memory for."""
    rows = rows_of([(60, 60)], n=32)
    own = [len(piece.rows.row_M) for piece in Segments(rows=2)(rows)]
    as_drawn = [int(((rows.row_M >= start) & (rows.row_M < start + 2)).sum()) for start in range(0, len(rows), 2)]
    assert max(own) < max(as_drawn) and max(own) <= 1.25 * sum(own) / len(own)


def test_halving_starts_from_what_was_used_and_ends_at_a_row():
    rows = rows_of([(8, 8)], n=5)
    segments = Segments(rows=100)
    assert len(segments(rows)) == 1 and segments.halve(segments.most) and segments.rows == 5
    for expected in (2, 1):
        segments(rows)
        assert segments.halve(segments.most) and segments.rows == expected
    segments(rows)
    assert not segments.halve(segments.most)
    segments = Segments(tokens=10**6)
    sizes = []
    segments(rows)
    while segments.halve(segments.most):
        sizes.append(max(len(piece.rows) for piece in segments(rows)))
    assert sizes == [5, 2, 1]
    whole = Segments()
    whole.whole(rows)
    assert whole.halve(whole.most) and max(len(piece.rows) for piece in whole(rows)) == 5


def test_halving_starts_from_the_micro_batch_cut_last():
    """An evaluation or an earlier step may have used more; what was only asked about was not used."""
    segments = Segments(rows=100)
    segments(rows_of([(8, 8)], n=12))
    segments(rows_of([(8, 8)], n=3))
    segments.fit([8] * 50)
    assert segments.one(rows_of([(8, 8)], n=20))
    assert segments.halve(segments.most) and segments.rows == 3


def test_kept_apart_everyone_gets_the_segments_of_answers():
    rows = rows_of([(5, 9), (30, 2), (0, 4), (9, 9)], n=3)
    segments = Segments(tokens=40)
    by_answer = [piece.index_S.tolist() for own in segments.by_answer(rows) for piece in own]
    assert [piece.index_S.tolist() for piece in segments(rows)] != by_answer
    segments.answers_apart = True
    assert [piece.index_S.tolist() for piece in segments(rows)] == by_answer
    assert [piece.index_S.tolist() for group in segments.by_stream(rows) for piece in group] == by_answer
