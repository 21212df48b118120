"""Train a masked diffusion language model on answers (supervised): `diffdpo sft`, for launchers that want a file."""

from diffdpo.cli.command import run
from diffdpo.cli.sft import main

if __name__ == "__main__":
    run(main)
