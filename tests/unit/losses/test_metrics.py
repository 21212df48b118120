"""Diagnostics: values by hand, additivity over micro-batches, and what an empty slot counts (nothing)."""

import math

import pytest
import torch

from diffdpo.losses.metrics import means, pair_sums

POLICY = torch.tensor([[-10.0, -12.0], [-20.0, -9.0], [0.0, 0.0]])
REFERENCE = torch.tensor([[-11.0, -10.0], [-18.0, -9.5], [0.0, 0.0]])  # ratios (1, -2), (-2, 0.5)
TOKENS = torch.tensor([[5, 4], [10, 2], [0, 0]])
WEIGHT = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])


def sums(rows=slice(None), **options):
    common = {"tokens_B2": TOKENS[rows], "weight_B2": WEIGHT[rows], "beta": 0.1}
    return pair_sums(POLICY[rows], REFERENCE[rows], **common, **options)


def test_values_by_hand():
    found = means(sums())
    assert found["rewards/chosen"] == pytest.approx((0.1 - 0.2) / 2)
    assert found["rewards/rejected"] == pytest.approx((-0.2 + 0.05) / 2)
    assert found["rewards/margins"] == pytest.approx((0.3 - 0.25) / 2)
    assert found["rewards/accuracies"] == 0.5
    assert found["scores/chosen"] == -15.0 and found["scores/reference_rejected"] == -9.75
    assert found["scores/displacement"] == 0.5
    assert found["kl/answers"] == pytest.approx((1 - 2 - 2 + 0.5) / 4)
    assert found["kl/per_token"] == pytest.approx((1 / 5 - 2 / 4 - 2 / 10 + 0.5 / 2) / 4)
    lengths, rewards = torch.tensor([[5.0, 4, 10, 2], [0.1, -0.2, -0.2, 0.05]])
    expected = torch.corrcoef(torch.stack([lengths, rewards]))[0, 1].item()
    assert found["rewards/length_correlation"] == pytest.approx(expected, rel=1e-6)
    assert "noise/score_variance" not in found


def test_ties_count_one_half():
    """Also where rounding makes one of them: 1e-5 nats between scores of 300."""
    policy = torch.tensor([[-300.0, -310.0], [-300.0, -310.0], [-300.0, -310.0], [-300.0, -310.0]])
    ratio = torch.tensor([[1.0, 1.0], [1.00003, 1.0], [1.0, 1.01], [1.01, 1.0]])
    tokens, weight = torch.full((4, 2), 50), torch.ones(4, 2)
    for row, expected in enumerate((0.5, 0.5, 0.0, 1.0)):
        one = slice(row, row + 1)
        found = pair_sums(policy[one], policy[one] - ratio[one], tokens_B2=tokens[one], weight_B2=weight[one], beta=0.1)
        assert means(found)["rewards/accuracies"] == expected


def test_sums_add_over_micro_batches():
    first, rest, whole = sums(slice(0, 1)), sums(slice(1, 3)), sums()
    assert list(first) == list(whole), "the order of the names is that in which ranks add them"
    assert {name: first[name] + rest[name] for name in whole} == pytest.approx(whole)


def test_noise_is_the_mean_of_what_is_known():
    stderr = torch.tensor([[3.0, float("nan")], [1.0, 1.0], [7.0, 7.0]])
    found = means(sums(stderr_B2=stderr, ratio_stderr_B2=stderr / 2))
    assert found["noise/score_variance"] == pytest.approx(11 / 3)
    assert found["noise/score_stderr"] == pytest.approx(math.sqrt(11 / 3))
    assert found["noise/ratio_variance"] == pytest.approx(11 / 12)


def test_unpaired_answers_have_rewards_but_no_margin():
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = means(pair_sums(POLICY, REFERENCE, tokens_B2=TOKENS, weight_B2=weight, beta=0.1))
    assert "rewards/margins" not in found and "rewards/rejected" not in found
    assert found["rewards/chosen"] == pytest.approx(-0.05)


def test_without_a_reference_nothing_is_compared_with_one():
    found = means(pair_sums(POLICY, None, tokens_B2=TOKENS, weight_B2=WEIGHT, beta=0.1))
    assert not {name for name in found if name.startswith(("kl/", "scores/reference", "scores/displacement"))}
    assert found["rewards/chosen"] == pytest.approx(0.1 * found["scores/chosen"]) and found["scores/chosen"] == -15.0


def test_nothing_gives_no_means():
    assert means(sums(slice(2, 3))) == {}


def test_nothing_is_preferred_among_scores_that_are_not_finite():
    """A run that diverges has no accuracy, not one of 0."""
    for damaged in (float("nan"), -float("inf")):
        policy = torch.tensor([[damaged, -12.0], [-20.0, -9.0], [0.0, 0.0]])
        found = means(pair_sums(policy, REFERENCE, tokens_B2=TOKENS, weight_B2=WEIGHT, beta=0.1))
        assert math.isnan(found["rewards/accuracies"])
    assert math.isnan(
        means(pair_sums(POLICY * math.nan, REFERENCE, tokens_B2=TOKENS, weight_B2=WEIGHT, beta=0.1))[
            "scores/displacement"
        ]
    )
