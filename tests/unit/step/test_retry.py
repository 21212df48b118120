"""Memory that really runs out in the middle of a step: the weights after it are those of an undisturbed run."""

import pytest
import torch

from diffdpo.errors import UserError
from diffdpo.memory.exhausted import out_of_memory
from tests.unit.step.test_backward import batches, make_step  # noqa: F401


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
def test_the_step_is_repeated_as_if_nothing_had_happened(tiny_model, batches, strategy, losses, where):  # noqa: F811
    expected, _ = weights_after(make_step(tiny_model, strategy, 2, losses), batches[:2])
    step = make_step(tiny_model, strategy, 8, losses)
    # the second micro-batch fails: the first has already left its gradient
    sizes = fail_above(step, 2, where=where, after=3)
    found, reports = weights_after(step, batches[:2])
    assert max(sizes) > 2, "nothing failed"
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert step.segments.rows <= 2 and reports[0].notes and not reports[1].notes
    assert "out of memory" in reports[0].notes[0] and f"{step.segments.rows} rows a segment" in reports[0].notes[-1]


def test_one_graph_becomes_two_passes(tiny_model, batches):  # noqa: F811
    expected, _ = weights_after(make_step(tiny_model, "none", 0), batches[:2])
    step = make_step(tiny_model, "none", 0)
    fail_above(step, 12, where="backward")
    found, reports = weights_after(step, batches[:2])
    assert step.strategy == "two_pass" and reports[0].notes
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("strategy", ["checkpoint", "two_pass"])
def test_what_one_segment_holds_is_computed_once(tiny_model, batches, strategy):  # noqa: F811
    step = make_step(tiny_model, strategy, 1000)
    sizes = fail_above(step, 10**6, where="forward")
    step(batches[:1], 1e-3)
    alone = len(sizes)
    step = make_step(tiny_model, "none", 0)
    sizes = fail_above(step, 10**6, where="forward")
    step(batches[:1], 1e-3)
    assert alone == len(sizes)


def test_a_single_row_that_does_not_fit_ends_the_run(tiny_model, batches):  # noqa: F811
    step = make_step(tiny_model, "two_pass", 4)
    fail_above(step, 0, where="forward")
    with pytest.raises(UserError, match=r"out of memory with one row in a forward .*--max_length"):
        step(batches[:1], 1e-3)


def test_other_errors_are_not_taken_for_it(tiny_model, batches):  # noqa: F811
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
