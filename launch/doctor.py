"""What this machine can do for a run and what is missing: `diffdpo doctor`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where nothing has been installed yet

from diffdpo.cli.doctor import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
