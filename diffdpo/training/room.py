"""What a run asks of its disk, looked at when its weights are known and before it begins."""

import shutil

from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine, count_parameters
from diffdpo.errors import UserError
from diffdpo.setup.context import RunContext
from diffdpo.training.checkpoint import in_words, list_checkpoints, planned_bytes


def check_room(config: RunConfig, context: RunContext, engine: Engine) -> None:
    """UserError where the disk has no room for the checkpoints that are to be kept, one in writing, and the model."""
    context.output_dir.mkdir(parents=True, exist_ok=True)
    one, weights = planned_bytes(engine), 4 * count_parameters(engine.module)[1]
    here = list_checkpoints(context.output_dir)
    needed = max(1, config.save_total_limit + 1 - len(here)) * one + weights
    free = shutil.disk_usage(context.output_dir).free
    if needed <= free:
        return
    told = (
        f"--output_dir {context.output_dir} has {in_words(free)} free; checkpoints of {in_words(one)} each (to keep: "
        f"{config.save_total_limit}, and one in writing) and the final model need {in_words(needed)}"
    )
    if config.save_on_full_disk == "stop":
        raise UserError(f"{told}; make room, lower --save_total_limit, or give --save_on_full_disk continue")
    context.print(f"WARNING: {told}")
