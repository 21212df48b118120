"""Diffusion scores of pairs under a model: `diffdpo score`."""

from diffdpo.cli.command import run
from diffdpo.cli.score import main

if __name__ == "__main__":
    run(main)
