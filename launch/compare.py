"""Runs beside each other, in tables and on a page with curves: `diffdpo compare`."""

from diffdpo.cli.compare import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
