"""Diffusion scores of pairs under a model: `diffdpo score`."""

from diffdpo.cli.score import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
