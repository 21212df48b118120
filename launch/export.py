"""A model folder to use or publish: `diffdpo export`."""

from diffdpo.cli.command import run
from diffdpo.cli.export import main

if __name__ == "__main__":
    run(main)
