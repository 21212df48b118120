"""What surrounds a run, whatever it trains: its folder is its own, it can be told to stop, and its pulse is watched."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from diffdpo.config import RunConfig
from diffdpo.engine.companions import ATTEMPT
from diffdpo.engine.launcher import watch_launcher
from diffdpo.engine.world import part, shutdown_distributed
from diffdpo.errors import Stopped, UserError
from diffdpo.setup.context import RunContext, open_context
from diffdpo.tracking.lock import one_run_in
from diffdpo.training.heartbeat import Pulse, beating
from diffdpo.training.stop import StopRequest, stop_on_signals

T = TypeVar("T")


@dataclass(frozen=True)
class Watch:
    """How a run hears that it should stop, and says that it lives."""

    pulse: Pulse
    stop: StopRequest = field(default_factory=StopRequest)


def guarded(
    config: RunConfig,
    command: str,
    work: Callable[[RunContext, Watch], T],
    *,
    stopped: Callable[[RunContext], T],
) -> T:
    """``work`` in a run's folder with its processes, or ``stopped`` where SIGTERM came with nothing to save.

    UserError where another run has the folder.
    """
    if config.max_restarts and ATTEMPT not in os.environ:
        raise UserError("--max_restarts starts the command again, and there is none from Python; leave it out")
    whole = True
    with stop_on_signals(StopRequest(config.stop_seconds)) as stop:
        try:
            watch_launcher(_end_without)  # before the processes meet: that may take as long as they are patient
            context = open_context(config, command)
            stop.say = context.print
            pulse = Pulse(context.world, context.output_dir, config.hang_timeout)
            try:
                with one_run_in(context.output_dir, context.world), beating(pulse):
                    return work(context, Watch(pulse, stop))
            except Stopped:
                return stopped(context)
        except RuntimeError:  # a TrainingError too
            whole = False
            raise
        finally:
            part()
            if whole:  # the end of a group that has lost a member may wait for it
                shutdown_distributed()
            stop.ended.set()


def _end_without(launcher: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{launcher}, which started this process, has gone: stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
