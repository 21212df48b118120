"""Models on held-out pairs and tasks, with error bars: `diffdpo evaluate`."""

from diffdpo.cli.evaluate import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
