"""Rounds of on-policy preference training: `diffdpo iterate RECIPE.yaml`."""

from diffdpo.cli.iterate import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
