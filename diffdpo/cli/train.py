"""Align a masked diffusion language model with preference pairs (Diffusion-DPO).

Run it with `deepspeed launch/train.py --ds_config ds_configs/4080_offload.json`, with torchrun, or with plain python.
"""

from diffdpo.cli.flags import parse_config
from diffdpo.cli.restarts import with_restarts
from diffdpo.config import TrainConfig
from diffdpo.errors import RESUMABLE


def main(argv: list[str]) -> int:
    """Parse first: a wrong flag must not wait for torch."""
    config = parse_config(TrainConfig, argv, __doc__ or "")

    def work() -> int:
        from diffdpo.training.preference import train

        return 0 if train(config).complete else RESUMABLE

    return with_restarts(config, work)
