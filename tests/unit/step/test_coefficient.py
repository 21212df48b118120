"""The loss's coefficient from other rows: the gradient is dL/dS there times ∇S of the gradient's own rows."""

from dataclasses import replace

import pytest
import torch

from diffdpo import build
from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.flags import parse_config
from diffdpo.scores.fold import fold
from diffdpo.step.backward import forward_rows, score_rows
from diffdpo.step.coefficient import CoefficientRows
from tests.unit.step.test_backward import WORLD, batches, gradient, make_step  # noqa: F401 - a fixture among them

BETA = 0.1


def by_hand(step, batch) -> torch.Tensor:
    """Gradient of the mean of -log σ(h), its coefficient -β σ(-h) from the mixed scores, by plain autograd."""
    own, other = (
        noise.rows(batch, WORLD.device, draw=draw)
        for draw, noise in ((0, step.noise), (1, replace(step.noise, num_samples=step.coefficient.num_samples)))
    )
    ratio = [
        (fold(score_rows(step.engine, rows, segments=step.segments), rows).score_B2)
        - fold(step.reference(rows, batch), rows).score_B2
        for rows in (own, other)
    ]
    n, more = step.noise.num_samples, step.coefficient.num_samples
    mean = (n * ratio[0] + more * ratio[1]) / (n + more) if step.coefficient.kind == "all" else ratio[1]
    slope_B = -BETA * torch.sigmoid(-BETA * (mean[:, 0] - mean[:, 1])) / len(batch.ids)
    score_B2 = fold(forward_rows(step.engine, own), own).score_B2
    gradients = torch.autograd.grad((slope_B * (score_B2[:, 0] - score_B2[:, 1])).sum(), step.engine.parameters)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("kind", ["other", "all"])
@pytest.mark.parametrize("strategy", ["none", "checkpoint", "two_pass", "deferred"])
def test_the_gradient_is_that_by_hand(tiny_model, batches, kind, strategy):  # noqa: F811
    step = make_step(tiny_model, strategy, segment_rows=2)
    step.coefficient = CoefficientRows(kind, 5)
    found, _ = gradient(step, batches[:1])
    expected = by_hand(step, batches[0])
    assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)
    same, _ = gradient(make_step(tiny_model, strategy, segment_rows=2), batches[:1])
    assert torch.linalg.norm(found - same) > 1e-3 * torch.linalg.norm(same)


def test_while_policy_is_reference_the_rows_do_not_matter(tiny_model, batches):  # noqa: F811
    step = make_step(tiny_model, "none", segment_rows=0, apart=False)
    step.coefficient = CoefficientRows("other", 2)
    found, loss = gradient(step, batches[:1])
    same, same_loss = gradient(make_step(tiny_model, "none", segment_rows=0, apart=False), batches[:1])
    assert loss == same_loss == pytest.approx(0.6931472, abs=1e-6)
    torch.testing.assert_close(found, same)


def test_the_sft_term_is_told_apart(tiny_model, batches):  # noqa: F811
    """The loss of the first step is ln 2 with other rows and an sft term too."""
    reports = []
    for kind in ("same", "other", "all"):
        step = make_step(tiny_model, "none", 0, "sigmoid,sft", apart=False)
        step.coefficient = CoefficientRows(kind, 5)
        reports.append(step(batches[:1], 0.0))
    assert [report.loss for report in reports] == pytest.approx([0.6931472] * 3, abs=1e-6)
    assert len({report.sft_loss for report in reports}) == 1
    assert [report.grad_norm for report in reports] == pytest.approx([reports[0].grad_norm] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_coefficient_samples", "3"], "of no use"),
        (["--num_coefficient_samples", "-1"], "at least 0"),
        (["--coefficient_rows", "all", "--score_estimator", "exact"], "exact"),
        (["--coefficient_rows", "all", "--reference", "precomputed"], "precomputed"),
    ],
)
def test_what_has_no_other_rows_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        parse_config(TrainConfig, flags, "")


def test_losses_of_a_whole_step_are_refused():
    config = TrainConfig(loss_type="aot", coefficient_rows="other")
    with pytest.raises(UserError, match="aot couples the pairs"):
        build.make_coefficient(config, build.make_loss(config))
    config = TrainConfig(coefficient_rows="other", num_mc_samples=6)
    assert build.make_coefficient(config, build.make_loss(config)) == CoefficientRows("other", 6)
