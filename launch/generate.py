"""Answers sampled from a masked diffusion model: `diffdpo generate`."""

from diffdpo.cli.command import run
from diffdpo.cli.generate import main

if __name__ == "__main__":
    run(main)
