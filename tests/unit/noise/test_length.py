"""LD-DPO: tokens that the longer answer has more count less, as TRL's ``ld_alpha`` weighs them."""

import numpy as np
import pytest
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold, row_scores

CPU, MASK, BLOCK = torch.device("cpu"), 99, 4


def batch():
    """Answers of 3 and 7 tokens, of 6 and 2, and a lone one of 5."""
    sides = [((3, 3), (3, 7)), ((5, 6), (5, 2)), ((2, 5), None)]
    pairs = [
        TokenPair(str(i), *(None if side is None else answer(*side, start=10 * i + 1) for side in pair))
        for i, pair in enumerate(sides)
    ]
    return collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)


def answer(prompt: int, length: int, start: int) -> TokenAnswer:
    return TokenAnswer(np.arange(start, start + prompt + length, dtype=np.int32), prompt)


def scores(alpha: float | None, *, block_size: int | None) -> torch.Tensor:
    """Where log p of token v is -v whatever is masked, a score is the sum over tokens, to be seen token by token."""
    noise = NoiseOptions("exact", 1, 0, MASK, None, block_size, None, alpha)
    rows = noise.draw_rows(batch(), CPU)
    return fold(row_scores(-rows.target_M.double(), rows), rows).score_B2


@pytest.mark.parametrize("block_size", [None, BLOCK])
def test_the_tail_of_the_longer_answer_is_weighted(block_size):
    def sums(first: int, length: int, shared: int) -> tuple[float, float]:
        tokens = list(range(first, first + length))
        return -sum(tokens[:shared]), -sum(tokens[shared:])

    expected = []
    for index, (prompt, lengths) in enumerate([(3, (3, 7)), (5, (6, 2)), (2, (5, 5))]):
        sides = [sums(10 * index + 1 + prompt, length, min(lengths)) for length in lengths]
        expected.append([shared + 0.25 * tail for shared, tail in sides])
    expected[2][1] = 0.0  # the absent side
    assert scores(0.25, block_size=block_size).tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


def test_a_weight_of_1_changes_nothing():
    assert torch.equal(scores(1.0, block_size=None), scores(None, block_size=None))
