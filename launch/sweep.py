"""A grid of runs, and their comparison: `diffdpo sweep`."""

from diffdpo.cli.sweep import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
