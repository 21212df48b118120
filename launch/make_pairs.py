"""Preference pairs of a model's own answers: `diffdpo make-pairs`, for launchers that want a file."""

from diffdpo.cli.make_pairs import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
