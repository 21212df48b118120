"""The command `diffdpo`: one word for what to do, then the flags of that command. No torch in here."""

import difflib
import importlib
import os
import sys
from typing import NoReturn

from diffdpo import __version__
from diffdpo.command import run
from diffdpo.errors import UserError

COMMANDS = {
    "train": "align a model with preference pairs",
    "sft": "supervised training; makes new models too",
    "score": "diffusion scores of pairs under a model",
    "generate": "answers sampled from a model",
    "evaluate": "models on held-out pairs and tasks, compared",
    "lm_eval": "lm-evaluation-harness with these models",
    "make_pairs": "preference pairs of a model's own answers",
    "iterate": "rounds of make-pairs and train, each from the last",
    "export": "an adapter merged, weights in another dtype",
    "compare": "runs beside each other: what differs, which is better, a page with curves",
    "sweep": "a grid of runs, one after the other or several at a time, and their comparison",
    "plan": "does a run fit a machine, how long does a step take",
    "doctor": "what this machine can do for a run, what is missing",
    "data": "build, inspect, stats, verify, generate: shards and a look into them",
}


def entry() -> NoReturn:
    """What `diffdpo` and `python -m diffdpo` run."""
    run(main)


def main(argv: list[str]) -> int | None:
    """Hand the rest of the line to a command. UserError for one that does not exist."""
    ranks = [word for word in argv[:1] if word.startswith("--local")]  # launchers put theirs before the command
    argv = argv[len(ranks) :]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"diffdpo {__version__}")
        return 0
    name = argv[0].replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(
            f"diffdpo {argv[0]}: no such command{f'; {near[0]} is meant?' if near else ''} (see diffdpo --help)"
        )
    sys.argv = [f"diffdpo {name}", *argv[1:]]  # what parsers call themselves, and what a run notes as its command
    module = "data_pipeline.__main__" if name == "data" else f"diffdpo.cli.{name}"
    return importlib.import_module(module).main([*argv[1:], *(ranks if name in ("train", "sft") else ())])


def usage() -> str:
    """What there is, a line a command."""
    lines = [f"  {name.replace('_', '-'):<11} {what}" for name, what in COMMANDS.items()]
    return os.linesep.join(
        [
            "usage: diffdpo COMMAND [flags]      (diffdpo COMMAND --help tells its flags)",
            "",
            *lines,
            "",
            "Several processes: torchrun --nproc_per_node N -m diffdpo train ...",
            "                   deepspeed --module diffdpo train ...",
            "                   accelerate launch -m diffdpo train ...",
        ]
    )
