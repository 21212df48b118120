"""Out of memory in a step: forget it and take it again in segments of half the size.

Rows, noise and hence the gradient stay the same. A micro-batch whose backward broke off has left part of its gradient
behind, and with accumulation that cannot be told from what earlier micro-batches left: so all of the step is taken
again. Ranks fail apart but must repeat together: after each piece of work without collectives they ask one another.
"""

from collections.abc import Callable
from typing import TypeVar

from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.memory.exhausted import out_of_memory, release_memory
from diffdpo.step.segments import Segments, Size

T = TypeVar("T")


class StepTooLarge(Exception):
    """Raised on every rank when at least one ran out of memory. The message is the first one's, where there is any."""


def together(engine: Engine, work: Callable[[], T]) -> T:
    """The result of ``work``, which calls no collectives. StepTooLarge on all ranks when memory ran out on any.

    Where the engine cannot repeat a step (its forwards and backwards are collectives): UserError on the rank that
    failed, whose end takes the others with it.
    """
    result, failure = None, ""
    try:
        result = work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        obstacle = engine.why_not_repeat()
        if obstacle:
            raise UserError(
                f"out of memory ({_first_line(error)}), and the step cannot be repeated: {obstacle}; give a smaller "
                "--segment_rows, or --gradient_checkpointing true, and go on with --resume_from_checkpoint latest"
            ) from None
        failure = _first_line(error)
    # the error, and with it the frames that hold the tensors, is gone here
    if engine.why_not_repeat() is None and engine.world.largest(int(bool(failure))):
        raise StepTooLarge(failure or "another process ran out of memory")
    return result  # type: ignore[return-value]


def make_smaller(engine: Engine, segments: Segments, why: str) -> str:
    """Half the segments; what was done, for the user. UserError where a segment is one row already."""
    release_memory()
    largest, most = engine.world.largest, segments.most
    if not segments.halve(Size(largest(most.rows), largest(most.tokens))):
        raise UserError(
            f"out of memory with one row in a forward ({why}); use a smaller --max_length, "
            "--gradient_checkpointing true, or --use_peft true"
        )
    return f"out of memory ({why}): the step is taken again with {segments.describe()}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
