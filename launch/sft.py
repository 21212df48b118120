"""Train a masked diffusion language model on answers (supervised): `diffdpo sft`, for launchers that want a file."""

from diffdpo.cli.sft import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
