"""Strategies: every one gives the gradient of one graph."""

import math
from dataclasses import replace

import pytest
import torch

from diffdpo.losses.metrics import means
from diffdpo.losses.mismatched import mismatched
from diffdpo.scores.fold import fold
from diffdpo.scores.rounding import RELATIVE
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments
from tests.support.steps import WORLD, gradient, make_step


@pytest.mark.parametrize("losses", ["sigmoid", "ipo,sft", "hinge"])
@pytest.mark.parametrize("strategy", ["checkpoint", "two_pass", "deferred"])
@pytest.mark.parametrize("segment_rows", [1, 5, 24])
def test_same_gradient_as_one_graph(tiny_model, batches, strategy, segment_rows, losses):
    expected, loss = gradient(make_step(tiny_model, "none", 0, losses), batches[:2])
    found, same_loss = gradient(make_step(tiny_model, strategy, segment_rows, losses), batches[:2])
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert same_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("losses", ["aot", "kto", "kto,sft"])
def test_a_loss_of_a_whole_step_does_not_depend_on_micro_batches(tiny_model, batches, losses):
    """aot sorts over the global batch, kto takes its z from it: 2 x 4 and 4 x 2 are 1 x 8."""
    whole = join(batches[0], batches[1])
    expected, loss = gradient(make_step(tiny_model, "two_pass", 7, losses), [whole])
    for pieces in (batches[:2], [part(whole, start, start + 2) for start in range(0, 8, 2)]):
        found, same_loss = gradient(make_step(tiny_model, "two_pass", 7, losses), pieces)
        assert (found - expected).norm() / expected.norm() < 1e-5
        assert same_loss == pytest.approx(loss, rel=1e-5)


def test_kto_measures_its_reference_point_on_mismatched_answers(tiny_model, batches):
    step = make_step(tiny_model, "two_pass", 7, "kto")
    batch = batches[0]

    def ratio(of):
        rows = step.noise.draw_rows(of, WORLD.device)
        with torch.no_grad():
            return fold(forward_rows(step.engine, rows) - step.reference(rows, of), rows).score_B2

    z = ratio(*mismatched([[batch]], rank=0)).mean().clamp(min=0)
    assert z > 0, "the test would not see whether z is used"
    reward = 0.1 * (ratio(batch) - z)
    by_hand = (torch.sigmoid(-reward[:, 0]) + torch.sigmoid(reward[:, 1])).sum() / 8
    assert step([batch], 0.0).loss == pytest.approx(float(by_hand), rel=1e-5)


def test_gradient_does_not_depend_on_micro_batches(tiny_model, batches):
    whole = join(batches[0], batches[1])
    expected, _ = gradient(make_step(tiny_model, "none", 0), [whole])
    found, _ = gradient(make_step(tiny_model, "none", 0), batches[:2])
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_first_loss_is_ln_2(tiny_model, batches):
    """Not to the bit: a forward with a graph may take other kernels than one without; the processor decides."""
    report = make_step(tiny_model, "none", 0, apart=False)(batches[:1], 0.0)
    assert report.loss == pytest.approx(0.69314718, abs=1e-6)
    assert report.relative_logit <= RELATIVE[False]
    assert report.largest_logit < 2e-2 and report.records == 4
    assert means(report.sums)["rewards/accuracies"] == 0.5, "policy and reference agree: ties"


@pytest.mark.parametrize("strategy", ["none", "two_pass", "deferred"])
@pytest.mark.parametrize("segment_rows", [1, 5, 24])
def test_rounding_is_told_from_a_fault(tiny_model, batches, strategy, segment_rows):
    """Whatever the segments, equal models stay below the tolerance; 1 part in 100 of the weights is seen."""
    step = make_step(tiny_model, strategy, segment_rows, apart=False)
    reference = make_step(tiny_model, "none", 0, apart=False).reference
    step.reference = lambda rows, batch: reference(rows, batch)
    assert step(batches[:1], 0.0).relative_logit <= RELATIVE[False] / 2, "with room for other processors"
    with torch.no_grad():
        for parameter in step.engine.module.parameters():
            parameter *= 1 + 1e-2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    report = step(batches[:1], 0.0)
    assert report.relative_logit > RELATIVE[False]
    assert 0 <= means(report.sums)["rewards/accuracies"] <= 1


def test_a_logit_that_is_no_number_is_no_logit_of_0(tiny_model, batches):
    step = make_step(tiny_model, "none", 0, apart=False)
    with torch.no_grad():
        next(iter(step.engine.module.parameters())).fill_(float("nan"))
    report = step(batches[:1], 0.0)
    assert math.isnan(report.largest_logit) and math.isnan(report.relative_logit) and math.isnan(report.loss)


def test_a_step_without_pairs_has_no_loss(tiny_model, batches):
    empty = replace(batches[0], weight_B2=torch.zeros_like(batches[0].weight_B2))
    report = make_step(tiny_model, "none", 0)([empty], 0.0)
    assert report.records == 0 and math.isnan(report.loss) and report.grad_norm == 0.0


def test_the_sft_term_is_reported_apart(tiny_model, batches):
    report = make_step(tiny_model, "none", 0, "sigmoid,sft", apart=False)(batches[:1], 0.0)
    alone = make_step(tiny_model, "none", 0, "sft", apart=False)(batches[:1], 0.0)
    assert report.loss == pytest.approx(0.69314718, abs=1e-6)
    assert report.sft_loss == pytest.approx(alone.loss, rel=1e-5) and alone.sft_loss is None


def test_a_slot_without_a_pair_changes_nothing(tiny_model, batches):
    """Weight-0 slots take part in the computation, so ranks stay in step, and not in the result."""
    expected, loss = gradient(make_step(tiny_model, "none", 0), [batches[0]])
    found, same_loss = gradient(make_step(tiny_model, "none", 0), [with_empty_slot(batches[0])])
    assert torch.allclose(found, expected, atol=1e-7)
    assert same_loss == pytest.approx(loss, rel=1e-6)


def test_scores_do_not_depend_on_segments(tiny_model, batches):
    step = make_step(tiny_model, "none", 0)
    rows = step.noise.draw_rows(batches[0], WORLD.device)
    whole = score_rows(step.engine, rows, segments=Segments())
    for size in (1, 3, 10):
        assert torch.allclose(score_rows(step.engine, rows, segments=Segments(rows=size)), whole, atol=1e-4)


def join(a, b):
    """Two batches as one."""
    from data_pipeline.batch import PairBatch

    longest = max(a.input_ids_B2T.shape[-1], b.input_ids_B2T.shape[-1])
    ids = [torch.nn.functional.pad(x.input_ids_B2T, (0, longest - x.input_ids_B2T.shape[-1])) for x in (a, b)]
    return PairBatch(
        torch.cat(ids),
        torch.cat([a.lengths_B2, b.lengths_B2]),
        torch.cat([a.prompt_lengths_B2, b.prompt_lengths_B2]),
        torch.cat([a.weight_B2, b.weight_B2]),
        a.ids + b.ids,
        a.epoch,
        a.step,
        0,
        True,
        records=a.records + b.records,
    )


def part(batch, start: int, stop: int):
    """Records start .. stop of a batch."""
    names = ("input_ids_B2T", "lengths_B2", "prompt_lengths_B2", "weight_B2", "ids", "records")
    return replace(batch, **{name: getattr(batch, name)[start:stop] for name in names})


def with_empty_slot(batch):
    """The batch and one slot of weight 0."""
    from data_pipeline.batch import PairBatch

    def grown(tensor):
        return torch.cat([tensor, torch.zeros_like(tensor[:1])])

    return PairBatch(
        grown(batch.input_ids_B2T),
        grown(batch.lengths_B2),
        grown(batch.prompt_lengths_B2),
        grown(batch.weight_B2),
        (*batch.ids, ""),
        batch.epoch,
        batch.step,
        0,
        True,
    )
