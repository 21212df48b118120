"""Align a masked diffusion language model with preference pairs: `diffdpo train`, for launchers that want a file.

Run it with `deepspeed launch/train.py --ds_config ds_configs/4080_offload.json`, with torchrun, or with plain python.
"""

from diffdpo.cli.train import main
from diffdpo.command import run

if __name__ == "__main__":
    run(main)
