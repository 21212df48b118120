"""Out of memory in a step or an evaluation: forget it and take it again in segments of half the size.

Rows, noise and hence the gradient stay the same. A micro-batch whose backward broke off has left part of its gradient
behind, and with accumulation that cannot be told from what earlier micro-batches left: so all of the step is taken
again. Ranks fail apart but must repeat together: after each piece of work without collectives they ask one another.
"""

from collections.abc import Callable
from typing import TypeVar

from tqdm import tqdm

from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.memory.exhausted import first_line, out_of_memory, release_memory
from diffdpo.scores.segments import Segments, Size

T = TypeVar("T")


class StepTooLarge(Exception):
    """Raised on every rank when at least one ran out of memory; ``here``: whether this one did."""

    def __init__(self, why: str):
        super().__init__(why or "another process ran out of memory")
        self.here = bool(why)


def run_on_all_ranks(engine: Engine, work: Callable[[], T], *, graph: bool = True) -> T:
    """The result of ``work``, which calls no collectives. StepTooLarge on all ranks when memory ran out on any.

    Where the engine cannot repeat the work (its forwards or backwards are collectives): UserError on the rank that
    failed, whose end takes the others with it. Without a ``graph`` there are forwards alone, of an evaluation.
    """
    result, failure = None, ""
    obstacle = engine.retry_obstacle() if graph or engine.choice.meets_in_forwards else None
    try:
        result = work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        failure = first_line(error)
        if obstacle:
            raise UserError(_cannot_repeat(failure, obstacle, graph=graph)) from None
    # the error, and with it the frames that hold the tensors, is gone here
    if obstacle is None and engine.world.all_reduce_max(int(bool(failure))):
        raise StepTooLarge(failure)
    return result  # type: ignore[return-value]


def _cannot_repeat(failure: str, obstacle: str, *, graph: bool) -> str:
    if not graph:
        return (
            f"out of memory in an evaluation ({failure}), which cannot be repeated: {obstacle}; give a smaller "
            "--per_device_eval_batch_size"
        )
    return (
        f"out of memory ({failure}), and the step cannot be repeated: {obstacle}; give a smaller "
        "--segment_rows, or --gradient_checkpointing true, and go on with --resume_from_checkpoint latest"
    )


def halve_segments(engine: Engine, segments: Segments, failure: StepTooLarge, *, graph: bool = True) -> str:
    """Half of the segments that were too large; what was done, for the user. UserError where that was one row."""
    release_memory()
    most = segments.most if failure.here else Size(0, 0)  # others went on to segments that fitted
    if not segments.halve(Size(engine.world.all_reduce_max(most.rows), engine.world.all_reduce_max(most.tokens))):
        more = ", --gradient_checkpointing true, or --use_peft true" if graph else " or a smaller model"
        raise UserError(f"out of memory with one row in a forward ({failure}); use a smaller --max_length{more}")
    what = "step is taken again" if graph else "evaluation goes on"
    return f"out of memory ({failure}): the {what} with {segments.describe()}"


def repeated(engine: Engine, work: Callable[[], T], *, segments: Segments) -> T:
    """The result of ``work``, forwards without a graph, in ever smaller segments while it raises StepTooLarge."""
    while True:
        try:
            return work()
        except StepTooLarge as failure:
            note = halve_segments(engine, segments, failure, graph=False)
            if engine.world.is_main:
                tqdm.write(note)
