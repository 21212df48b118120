"""``--replay``: a step that was not finite taken again, alone and record by record. Nothing is trained or written."""

import math
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.setup.context import RunContext
from diffdpo.step.report import StepReport
from diffdpo.training.checkpoint import find_checkpoint, list_checkpoints, read_state, told_if_unreadable
from diffdpo.training.culprit import Culprit, each_record, read_culprit
from diffdpo.training.loop import StepFunction


def replay(path: Path, context: RunContext, engine: Engine, step: StepFunction, *, alone: bool) -> StepReport:
    """Say what each record (``alone``: its loss is its own) and the step as a whole come to; the report of the whole.

    UserError where the file cannot be used by these processes.
    """
    culprit = read_culprit(path)
    micro_batches = share_of(culprit, context)
    context.print(f"replay     step {culprit.step}, {_load(path, context, engine)}")
    if context.world.size > 1 or not alone:
        context.print("           the step as a whole; record by record it goes on one process")
    else:
        _each(micro_batches, context, step)
    report = step(micro_batches, culprit.learning_rate)
    context.print(
        f"step {culprit.step}: loss {report.loss}, gradient norm {report.grad_norm}; in the run loss {culprit.loss}, "
        f"gradient norm {culprit.grad_norm}"
    )
    return report


def share_of(culprit: Culprit, context: RunContext) -> list[PairBatch]:
    """The micro-batches of this rank, on as many processes as the run had or a fraction of them."""
    world = context.world
    if len(culprit.batches) % world.size:
        raise UserError(f"--replay: the step was of {len(culprit.batches)} processes; take as many, or one")
    ranks = culprit.batches[world.rank :: world.size]
    return [batch for rank in ranks for batch in rank]


def _load(path: Path, context: RunContext, engine: Engine) -> str:
    """Put weights in place; which, in words."""
    kept = path.with_suffix("")
    if kept.is_dir():
        with told_if_unreadable(kept):
            engine.load(kept)
        return f"weights as they were before it ({kept})"
    if list_checkpoints(path.parent):
        found = find_checkpoint("latest", path.parent, context.world, context.print)
        assert found is not None, "there is one"
        with told_if_unreadable(found):
            engine.load(found)
        return f"weights of step {read_state(found)['step']}, the nearest that were kept: not those of the step"
    return "weights as the run began: it has kept none"


def _each(micro_batches: Sequence[PairBatch], context: RunContext, step: StepFunction) -> None:
    """Every record as a step of its own, which changes no weight: the rate is 0."""
    alone = [record for batch in micro_batches for record in each_record(batch)]
    for record in alone:
        report = step([record], 0.0)
        fine = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        mark = "" if fine else "   <- not finite"
        context.print(f"{record.ids[0]:<28} loss {report.loss:<12.6g} gradient norm {report.grad_norm:.6g}{mark}")
