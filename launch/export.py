"""A model folder to use or publish: `diffdpo export`."""

from diffdpo.cli.export import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
