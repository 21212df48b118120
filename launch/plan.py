"""Does a run fit a machine, and how long does a step take: `diffdpo plan`."""

from diffdpo.cli.command import run
from diffdpo.cli.plan import main

if __name__ == "__main__":
    run(main)
