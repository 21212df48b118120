"""Strategies: every one gives the gradient of one graph."""

from dataclasses import replace

import pytest
import torch

from data_pipeline.encode import Encoder
from data_pipeline.reader import PairLoader, open_dataset
from diffdpo.engine.base import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.losses.mismatched import mismatched
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import copy_reference, frozen_copy
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.step import LossOptions, PreferenceStep

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def batches(tiny_model, pairs_file, tmp_path_factory):
    loaded = load_model(str(tiny_model))
    dataset = open_dataset(str(pairs_file), cache_dir=tmp_path_factory.mktemp("cache"))
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    loader = PairLoader(dataset, encoder, seed=0, global_batch_size=4, micro_batch_size=4)
    return list(loader)


def make_step(tiny_model, strategy: str, segment_rows: int, losses: str = "sigmoid", *, apart: bool = True):
    """A step whose policy is not its reference (``apart``), so that h is not 0."""
    loaded = load_model(str(tiny_model))
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    frozen = frozen_copy(module)
    if apart:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    engine = PlainEngine(module, WORLD, OptimizerOptions(learning_rate=1e-3))
    names = tuple(losses.split(","))
    return PreferenceStep(
        engine,
        copy_reference(engine, frozen, segments=Segments(rows=segment_rows)),
        NoiseOptions("mask_count", 3, 0, loaded.spec.mask_token_id),
        LossOptions(names, (1.0,) * len(names), beta=0.1),
        strategy=strategy,
        segments=Segments(rows=segment_rows),
    )


def gradient(step: PreferenceStep, micro_batches) -> tuple[torch.Tensor, float]:
    """Gradient of one step, caught before the optimizer uses it."""
    found = []
    step.engine.optimizer.step = lambda: found.append(
        torch.cat([p.grad.flatten().clone() for p in step.engine.parameters])
    )
    report = step(micro_batches, 0.0)
    return found[0], report.loss + (report.sft_loss or 0.0)


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
        rows = step.noise.rows(of, WORLD.device)
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
    report = make_step(tiny_model, "none", 0, apart=False)(batches[:1], 0.0)
    assert report.loss == pytest.approx(0.69314718, abs=1e-6)
    assert report.largest_logit == 0.0
    assert report.records == 4


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
    rows = step.noise.rows(batches[0], WORLD.device)
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
    )


def part(batch, start: int, stop: int):
    """Records start .. stop of a batch."""
    names = ("input_ids_B2T", "lengths_B2", "prompt_lengths_B2", "weight_B2", "ids")
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
