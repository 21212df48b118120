"""Memory that really runs out in the middle of a step: the weights after it are those of an undisturbed run."""

from dataclasses import replace

import pytest
import torch

from diffdpo.engine.choice import DEEPSPEED, EngineChoice
from diffdpo.engine.sharding import Sharding
from diffdpo.errors import UserError
from diffdpo.evaluation.preferences import score_held_out
from diffdpo.memory.exhausted import out_of_memory, told_if_exhausted
from diffdpo.scores.segments import Segments
from tests.support.steps import make_step


class Greedy(torch.autograd.Function):
    """The identity; its backward asks for more memory than any machine has."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.empty(2**60)[0]


def fail_above(step, rows: int, *, where: str, after: int = 0) -> list[int]:
    """Forwards of more than ``rows`` rows run out of memory, but for the first ``after`` calls. Returns their sizes."""
    module, seen = step.engine.module, []
    forward = module.forward

    def greedy(input_ids_RT, *rest):
        seen.append(len(input_ids_RT))
        too_many = len(input_ids_RT) > rows and len(seen) > after
        if too_many and where == "forward":
            torch.empty(2**60)
        out = forward(input_ids_RT, *rest)
        return Greedy.apply(out) if too_many and out.requires_grad else out

    module.forward = greedy
    return seen


def weights_after(step, micro_batches, steps: int = 2):
    reports = [step(micro_batches, 1e-3) for _ in range(steps)]
    return torch.cat([p.detach().flatten() for p in step.engine.parameters]), reports


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("strategy", "losses"), [("checkpoint", "sigmoid"), ("deferred", "sigmoid"), ("two_pass", "aot")]
)
def test_the_step_is_repeated_as_if_nothing_had_happened(tiny_model, batches, strategy, losses, where):
    expected, _ = weights_after(make_step(tiny_model, strategy, 2, losses), batches[:2])
    step = make_step(tiny_model, strategy, 8, losses)
    # the second micro-batch fails: the first has already left its gradient
    sizes = fail_above(step, 2, where=where, after=3)
    found, reports = weights_after(step, batches[:2])
    assert max(sizes) > 2, "nothing failed"
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert step.segments.rows <= 2 and reports[0].notes and not reports[1].notes
    assert "out of memory" in reports[0].notes[0] and f"{step.segments.rows} rows a segment" in reports[0].notes[-1]


def test_one_graph_becomes_two_passes(tiny_model, batches):
    expected, _ = weights_after(make_step(tiny_model, "none", 0), batches[:2])
    step = make_step(tiny_model, "none", 0)
    fail_above(step, 12, where="backward")
    found, reports = weights_after(step, batches[:2])
    assert step.strategy == "two_pass" and reports[0].notes
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("strategy", ["checkpoint", "two_pass"])
def test_what_one_segment_holds_is_computed_once(tiny_model, batches, strategy):
    step = make_step(tiny_model, strategy, 1000)
    sizes = fail_above(step, 10**6, where="forward")
    step(batches[:1], 1e-3)
    alone = len(sizes)
    step = make_step(tiny_model, "none", 0)
    sizes = fail_above(step, 10**6, where="forward")
    step(batches[:1], 1e-3)
    assert alone == len(sizes)


def test_a_single_row_that_does_not_fit_ends_the_run(tiny_model, batches):
    step = make_step(tiny_model, "two_pass", 4)
    fail_above(step, 0, where="forward")
    with pytest.raises(UserError, match=r"out of memory with one row in a forward .*--max_length"):
        step(batches[:1], 1e-3)


def test_other_errors_are_not_taken_for_it(tiny_model, batches):
    step = make_step(tiny_model, "two_pass", 4)
    step.engine.module.forward = lambda *inputs: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        step(batches[:1], 1e-3)


def test_what_the_allocators_say():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert out_of_memory(error.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("out of memory"))


def held_out(step, batches, **options):
    return score_held_out(step.engine, step.reference, batches, step.noise, step.loss, **options)


def test_every_halving_makes_the_step_smaller(tiny_model, batches):
    """Whatever was run in one forward before: here a larger micro-batch."""
    step = make_step(tiny_model, "two_pass", 1000)
    step(batches[:1], 1e-3)
    small = replace(
        batches[1],
        **{name: getattr(batches[1], name)[:1] for name in ("ids", "records", "input_ids_B2T", "lengths_B2")},
        **{name: getattr(batches[1], name)[:1] for name in ("prompt_lengths_B2", "weight_B2")},
    )
    sizes = fail_above(step, 3, where="forward")
    assert len(step([small], 1e-3).notes) == 1 and max(sizes) == 6


def test_an_evaluation_goes_on_in_smaller_segments(tiny_model, batches, capsys):
    step = make_step(tiny_model, "two_pass", 1000)
    expected = held_out(step, batches, segments=Segments(rows=1000))
    segments = Segments(rows=1000)
    sizes = fail_above(step, 7, where="forward")
    found = held_out(step, batches, segments=segments)
    assert max(sizes) > 7 and segments.rows <= 7
    assert torch.allclose(found.policy_P2, expected.policy_P2, atol=1e-3)
    assert f"the evaluation goes on with {segments.rows} rows a segment" in capsys.readouterr().out


def test_an_evaluation_that_cannot_be_repeated_ends_with_one_line(tiny_model, batches):
    step = make_step(tiny_model, "two_pass", 1000)
    fail_above(step, 0, where="forward")
    with pytest.raises(UserError, match=r"out of memory with one row in a forward .* use a smaller --max_length or"):
        held_out(step, batches, segments=Segments(rows=1000))
    step.engine.choice = EngineChoice(DEEPSPEED, sharding=Sharding(True, True, True))
    step.engine.retry_obstacle = lambda: "weights are in shards"
    with pytest.raises(UserError, match=r"in an evaluation .*weights are in shards; .*--per_device_eval") as caught:
        held_out(step, batches, segments=Segments(rows=1000))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_repeated_is_one_line():
    with pytest.raises(UserError, match=r"^out of memory here \(.*\); do less$"), told_if_exhausted("here", "do less"):
        torch.empty(2**60)
    with pytest.raises(ValueError, match="other"), told_if_exhausted("here", "do less"):
        raise ValueError("other")
