"""Preference losses: hand-worked values, gradients, extremes, what is counted, what is refused.

Hand-worked case: β = 0.1; S = (-10, -12), R = (-11, -10), so r = (1, -2), h = 0.3; L = (5, 4).
"""

import math

import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.losses.preference import LOSSES, check_loss, loss_count, preference_loss, reference_point_of

POLICY = torch.tensor([[-10.0, -12.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -10.0]], dtype=torch.float64)
TOKENS = torch.tensor([[5, 4]])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def case(name, **options):
    if name == "kto":
        options.setdefault("reference_point", 0.0)
    if name == "exo_pair":
        options.setdefault("label_smoothing", 1e-3)
    return preference_loss(name, policy_B2=POLICY, reference_B2=REFERENCE, tokens_B2=TOKENS, **options).item()


BY_HAND = {
    "sigmoid": -math.log(sigma(0.3)),  # 0.554355
    "robust": -math.log(sigma(0.3)),
    "hinge": 0.7,
    "ipo": (0.2 + 0.5 - 5.0) ** 2,  # 18.49
    "ipo_sum": (3.0 - 5.0) ** 2,
    "exo_pair": sigma(0.3) * (math.log(sigma(0.3)) - math.log(0.999))
    + sigma(-0.3) * (math.log(sigma(-0.3)) - math.log(0.001)),
    "nca_pair": -math.log(sigma(0.1)) - 0.5 * math.log(sigma(-0.1)) - 0.5 * math.log(sigma(0.2)),
    "bco_pair": -math.log(sigma(0.1)) - math.log(sigma(0.2)),
    "sppo_hard": (1 - 5) ** 2 + (-2 + 5) ** 2,
    "apo_zero": 1 - sigma(0.1) + sigma(-0.2),
    "apo_down": sigma(0.1) + 1 - sigma(0.3),
    "discopop": (1 - sigma(6.0)) * -math.log(sigma(0.3)) + sigma(6.0) * math.exp(-0.3),
    "sigmoid_norm": -math.log(sigma(0.1 * (0.2 + 0.5))),
    "simpo": -math.log(sigma(0.1 * (-2.0 + 3.0) - 0.5)),
    "sft": 2.0,
    "aot": -math.log(sigma(0.3)),  # one pair: nothing to sort
    "aot_unpaired": -math.log(sigma(0.3)),
    "kto": 1 - sigma(0.1) + 1 - sigma(0.2),
    "apo_zero_unpaired": 1 - sigma(0.1) + sigma(-0.2),
}


def test_every_loss_has_a_hand_worked_value():
    assert set(BY_HAND) == set(LOSSES)


@pytest.mark.parametrize("name", list(LOSSES))
def test_hand_worked_value(name):
    assert case(name) == pytest.approx(BY_HAND[name], abs=1e-7)


def test_label_smoothing_by_hand():
    loss, flipped = -math.log(sigma(0.3)), -math.log(sigma(-0.3))
    assert case("sigmoid", label_smoothing=0.2) == pytest.approx(0.8 * loss + 0.2 * flipped)
    assert case("robust", label_smoothing=0.2) == pytest.approx((0.8 * loss - 0.2 * flipped) / 0.6)


def test_kto_by_hand_with_weights_and_kl():
    value = case("kto", reference_point=3.0, desirable_weight=2.0, undesirable_weight=0.5)
    assert value == pytest.approx(2 * (1 - sigma(0.1 * (1 - 3))) + 0.5 * (1 - sigma(0.1 * (3 + 2))))


def test_several_losses_add_with_their_weights():
    assert case("sigmoid,sft", weights=[1.0, 0.05]) == pytest.approx(BY_HAND["sigmoid"] + 0.05 * 2.0)
    assert case(["sigmoid", "hinge"]) == pytest.approx(BY_HAND["sigmoid"] + 0.7)


def test_reference_free_reads_no_reference():
    value = preference_loss("sigmoid", policy_B2=POLICY, reference_B2=None, tokens_B2=TOKENS).item()
    assert value == pytest.approx(-math.log(sigma(0.2)))
    assert [name for name, loss in LOSSES.items() if loss.reference_free] == ["simpo", "sft"]


def test_equal_policy_and_reference_start_at_ln_2():
    score = torch.randn(7, 2)
    loss = preference_loss("sigmoid", policy_B2=score, reference_B2=score.clone(), tokens_B2=torch.ones(7, 2))
    assert torch.equal(loss, torch.full((7,), math.log(2)))


def random_case(pairs=6):
    generator = torch.Generator().manual_seed(3)
    scores = 4 * torch.randn(2, pairs, 2, generator=generator, dtype=torch.float64)
    return scores[0].requires_grad_(), scores[1], torch.randint(1, 9, (pairs, 2), generator=generator)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradient(name):
    policy, reference, tokens = random_case()
    options = {"reference_point": 0.5, "label_smoothing": 0.1, "beta": 0.3}
    assert torch.autograd.gradcheck(
        lambda score: preference_loss(name, policy_B2=score, reference_B2=reference, tokens_B2=tokens, **options),
        policy,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(LOSSES))
def test_extreme_scores_stay_finite(name, dtype):
    extremes = [-1e5, -1e4, -1.0, 0.0, 1.0, 1e4, 1e5]
    policy = torch.tensor([[a, b] for a in extremes for b in extremes], dtype=dtype, requires_grad=True)
    options = {"reference_point": 1.0, "label_smoothing": 0.1, "beta": 1.0}
    zero = torch.zeros_like(policy)
    loss = preference_loss(name, policy_B2=policy, reference_B2=zero, tokens_B2=torch.ones_like(policy), **options)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("name", list(LOSSES))
def test_absent_pairs_count_nothing(name):
    policy, reference, tokens = random_case(4)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    options = {"label_smoothing": 0.1, "reference_point": 0.2}
    loss = preference_loss(
        name, policy_B2=policy, reference_B2=reference, tokens_B2=tokens, weight_B2=weight, **options
    )
    loss.sum().backward()
    real = preference_loss(name, policy_B2=policy[::2], reference_B2=reference[::2], tokens_B2=tokens[::2], **options)
    torch.testing.assert_close(loss[::2], real)
    assert (loss[1::2] == 0).all() and (policy.grad[1::2] == 0).all()


def test_unpaired_records_are_for_losses_of_answers():
    policy, reference, tokens = random_case(2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scores = {"policy_B2": policy, "reference_B2": reference, "tokens_B2": tokens, "weight_B2": weight}
    assert (preference_loss("sigmoid", **scores) == 0).all()
    ratio = (policy - reference).detach()
    expected = [sigma(-0.1 * ratio[0, 0].item()), sigma(0.1 * ratio[1, 1].item())]
    assert preference_loss("kto", reference_point=0.0, **scores).tolist() == pytest.approx(expected)
    assert loss_count("sigmoid", weight) == 0
    assert loss_count("kto", weight) == 2


def test_aot_sorts_margins():
    policy = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    reference = torch.tensor([[0.5, 0.0], [2.0, 0.0]])
    loss = preference_loss("aot", policy_B2=policy, reference_B2=reference, tokens_B2=torch.ones(2, 2), beta=1.0)
    assert loss.tolist() == pytest.approx([-math.log(sigma(1 - 0.5)), -math.log(sigma(3 - 2))])


def test_reference_point_of_is_a_detached_mean_of_present_answers_and_never_negative():
    policy = torch.tensor([[3.0, 50.0], [1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    z = reference_point_of(policy, torch.zeros(2, 2), weight)
    assert z.item() == 2.0 and not z.requires_grad
    assert reference_point_of(-policy, torch.zeros(2, 2), weight).item() == 0.0


@pytest.mark.parametrize(
    ("names", "options", "word"),
    [
        ("dpo", {}, "unknown"),
        ("sigmoid,", {}, "unknown"),
        ("sigmoid,sft", {"weights": [1.0]}, "1 numbers for 2"),
        ("exo_pair", {}, "exo_pair needs"),
        ("robust", {"label_smoothing": 0.5}, "robust needs"),
        ("discopop", {"discopop_tau": 0.0}, "discopop needs"),
        ("kto,sigmoid", {}, "mixes"),
    ],
)
def test_bad_settings_say_what_to_change(names, options, word):
    with pytest.raises(UserError, match=word):
        check_loss(names, **options)
