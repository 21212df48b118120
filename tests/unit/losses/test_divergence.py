"""Variants of the objective under TRL's names, against TRL's formulas written out on the same numbers."""

import math

import pytest
import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.losses.preference import preference_loss

POLICY = torch.tensor([[-20.0, -31.0], [-12.5, -11.0], [-40.0, -38.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-21.5, -29.0], [-12.0, -12.5], [-40.0, -38.0]], dtype=torch.float64)
TOKENS = torch.tensor([[10, 14], [6, 5], [20, 21]])
RATIOS = (POLICY - REFERENCE).tolist()
BETA = 0.3

SCORE = {
    ("reverse_kl", 1.0): lambda r: r,
    ("forward_kl", 1.0): lambda r: -math.exp(-r),
    ("js_divergence", 1.0): lambda r: -math.log(1 + math.exp(-r)),
    ("alpha_divergence", 1.0): lambda r: r,
    ("alpha_divergence", 0.5): lambda r: math.exp(-0.5 * r) / -0.5,
    ("alpha_divergence", 2.0): lambda r: math.exp(r),
}


def loss(names, **options):
    given = {"policy_B2": POLICY, "reference_B2": REFERENCE, "tokens_B2": TOKENS, "beta": BETA}
    return preference_loss(names, **given, **options).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("name", "coefficient"), SCORE)
def test_divergences_are_trls(name, coefficient):
    score, options = SCORE[name, coefficient], {"divergence": name, "divergence_coefficient": coefficient}
    w, l = ([score(pair[side]) for pair in RATIOS] for side in (0, 1))
    expected = [-math.log(sigmoid(BETA * (a - b))) for a, b in zip(w, l, strict=True)]
    assert loss("sigmoid", **options) == pytest.approx(expected, rel=1e-9)
    expected = [(a - 0.5 / BETA) ** 2 + (b + 0.5 / BETA) ** 2 for a, b in zip(w, l, strict=True)]
    assert loss("sppo_hard", **options) == pytest.approx(expected, rel=1e-9)
    per_token = [(a / t[0], b / t[1]) for a, b, t in zip(w, l, TOKENS.tolist(), strict=True)]
    assert loss("ipo", **options) == pytest.approx([(a - b - 1 / (2 * BETA)) ** 2 for a, b in per_token], rel=1e-9)


def test_sft_beside_a_divergence_reads_the_score_itself():
    both = loss("sigmoid,sft", divergence="forward_kl")
    alone = [a + b for a, b in zip(loss("sigmoid", divergence="forward_kl"), loss("sft"), strict=True)]
    assert both == pytest.approx(alone)


def test_policy_equal_to_its_reference_gives_ln_2_under_every_divergence():
    for name, coefficient in SCORE:
        options = {"divergence": name, "divergence_coefficient": coefficient}
        assert loss("sigmoid", **options)[2] == pytest.approx(math.log(2), abs=1e-12)


def test_large_ratios_stay_finite():
    policy = torch.tensor([[-500.0, -10.0]], requires_grad=True)
    value = preference_loss(
        "sigmoid", policy_B2=policy, reference_B2=torch.zeros(1, 2), tokens_B2=torch.ones(1, 2), divergence="forward_kl"
    )
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(policy.grad).all()


def test_weights_are_wpos_and_carry_no_gradient():
    mean = (POLICY / TOKENS).tolist()
    weights = [math.exp(a + b) for a, b in mean]
    expected = [a * b for a, b in zip(weights, loss("sigmoid"), strict=True)]
    assert loss("sigmoid", use_weighting=True) == pytest.approx(expected, rel=1e-9)
    policy = POLICY.clone().requires_grad_(True)
    options = {"reference_B2": REFERENCE, "tokens_B2": TOKENS, "beta": BETA}
    preference_loss("sigmoid", policy_B2=policy, **options, use_weighting=True).sum().backward()
    weighted, policy.grad = policy.grad.clone(), None
    preference_loss("sigmoid", policy_B2=policy, **options).sum().backward()
    assert torch.allclose(weighted, torch.tensor(weights)[:, None] * policy.grad)


@pytest.mark.parametrize(
    "given",
    [
        {"f_divergence_type": "js_divergence", "loss_type": "apo_zero"},
        {"f_divergence_type": "js_divergence", "loss_type": "simpo"},
        {"f_divergence_type": "forward_kl", "loss_type": "aot"},
        {"f_alpha_divergence_coef": 0.5},
        {"use_weighting": True, "loss_type": "aot"},
        {"ld_alpha": 0.5, "loss_type": "kto"},
        {"ld_alpha": 1.5},
        {"ld_alpha": 0.5, "loss_type": "simpo"},
        {"ld_alpha": 0.5, "sft_weight": 1.0},
        {"ld_alpha": 0.5, "loss_type": "sigmoid,sft"},
        {"ld_alpha": 0.5, "use_weighting": True},
        {"f_divergence_type": "alpha_divergence"},
        {"sync_ref_model": True, "reference": "precomputed"},
        {"ref_model_sync_steps": 4},
    ],
)
def test_what_has_no_meaning_is_refused(given):
    with pytest.raises(UserError, match="--"):
        make_config(TrainConfig, given)
