"""Answers sampled from a masked diffusion model: `diffdpo generate`."""

from diffdpo.cli.generate import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
