"""Does a run fit a machine, and how long does a step take: `diffdpo plan`."""

from diffdpo.cli.plan import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
