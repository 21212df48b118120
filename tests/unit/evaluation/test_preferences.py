"""Held-out figures from a table of scores: by hand, for pairs, single answers and both."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffdpo.evaluation.estimate import Estimate
from diffdpo.evaluation.preferences import ScoreTable, separation
from diffdpo.losses.options import LossOptions
from diffdpo.losses.preference import LOSSES

# log-ratios: (1, -2), (0, 0), (-3, 1); β = 0.1
PAIRS = ScoreTable(
    policy_P2=torch.tensor([[-10.0, -12.0], [-5.0, -9.0], [-20.0, -9.0]]).double(),
    reference_P2=torch.tensor([[-11.0, -10.0], [-5.0, -9.0], [-17.0, -10.0]]).double(),
    tokens_P2=torch.tensor([[5.0, 4.0], [5.0, 3.0], [4.0, 9.0]]).double(),
    weight_P2=torch.ones(3, 2).double(),
)
SINGLES = replace(PAIRS, weight_P2=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double())
SIGMOID = LossOptions(("sigmoid",), (1.0,), beta=0.1)
KTO = LossOptions(("kto",), (1.0,), beta=0.1, parameters={"desirable_weight": 2.0})


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairs_by_hand_and_ties_count_half():
    values = PAIRS.values(SIGMOID)
    assert values["rewards/margins"] == pytest.approx([0.3, 0.0, -0.4])
    assert values["rewards/accuracies"] == [1.0, 0.5, 0.0]
    assert values["scores/accuracies"] == [1.0, 1.0, 0.0]  # per token: -2 > -3, -1 > -3, -5 < -1
    assert values["loss"] == pytest.approx([-math.log(sigma(h)) for h in (0.3, 0.0, -0.4)])
    assert "rewards/separation" not in values


def test_equal_scores_a_token_are_a_tie():
    same = replace(PAIRS, policy_P2=torch.tensor([[-10.0, -8.0], [-5.0, -3.0], [-20.0, -9.0]]).double())
    assert same.values(SIGMOID)["scores/accuracies"] == [0.5, 0.5, 0.0]


def test_the_loss_is_the_one_that_is_trained_without_its_sft_term():
    hinge = LossOptions(("hinge", "sft"), (2.0, 0.5), beta=0.1)
    assert PAIRS.values(hinge)["loss"] == pytest.approx([2 * 0.7, 2.0, 2 * 1.4])
    sft = LossOptions(("sft",), (1.0,), beta=0.1)
    assert SINGLES.values(sft)["loss"] == pytest.approx([2.0])


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].scope != "answer" and name != "sft"])
def test_every_loss_of_pairs_has_a_held_out_value(name):
    loss = LossOptions((name,), (1.0,), beta=0.1, parameters={"label_smoothing": 0.1})
    values = PAIRS.values(loss)["loss"]
    assert len(values) == 3 and np.isfinite(values).all()
    mixed = replace(PAIRS, weight_P2=torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]).double())
    assert len(mixed.values(loss)["loss"]) == 2


def test_single_answers_by_hand():
    values = replace(SINGLES, reference_point=torch.tensor(0.5)).values(KTO)
    assert values["rewards/chosen"] == pytest.approx([0.1])
    assert values["rewards/rejected"] == pytest.approx([0.0, 0.1])
    assert np.mean(values["rewards/separation"]) == pytest.approx(0.75)  # above one, level with the other
    expected = [2 * sigma(-0.1 * (1 - 0.5)), sigma(-0.1 * 0.5), sigma(0.1 * (1 - 0.5))]
    assert values["loss"] == pytest.approx(expected)
    assert "rewards/margins" not in values


def test_pairs_under_a_loss_of_answers_have_both():
    values = replace(PAIRS, reference_point=torch.tensor(0.0)).values(KTO)
    assert len(values["loss"]) == 6 and len(values["rewards/margins"]) == 3


def test_what_there_is_none_of_is_left_out():
    values = replace(SINGLES, weight_P2=SINGLES.weight_P2 * torch.tensor([1.0, 0.0])).values(
        LossOptions(("apo_zero_unpaired",), (1.0,), beta=0.1)
    )
    assert set(values) == {"loss", "rewards/chosen"}


def test_separation_and_its_error_bar():
    """AUC by counting, its standard error by drawing the answers again."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.7, 1.0, 60), np.round(rng.normal(0.0, 1.5, 90), 1)
    estimate = Estimate.of(separation(chosen, rejected))
    by_counting = ((chosen[:, None] > rejected) + 0.5 * (chosen[:, None] == rejected)).mean()
    assert estimate.mean == pytest.approx(by_counting)
    drawn = [separation(rng.normal(0.7, 1.0, 60), rng.normal(0.0, 1.5, 90)).mean() for _ in range(400)]
    assert estimate.stderr == pytest.approx(np.std(drawn), rel=0.25)
    assert separation(chosen, chosen[:0]).size == 0
