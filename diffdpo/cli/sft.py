"""Train a masked diffusion language model on answers (supervised), from scratch or from a checkpoint.

Without options: the bundled arithmetic model's recipe is `--config recipes/sft_arithmetic.yaml`.
"""

from diffdpo.cli.flags import parse_config
from diffdpo.cli.restarts import with_restarts
from diffdpo.config import SftConfig
from diffdpo.errors import RESUMABLE


def main(argv: list[str]) -> int:
    """Parse first: a wrong flag must not wait for torch."""
    config = parse_config(SftConfig, argv, __doc__ or "")

    def work() -> int:
        from diffdpo.training.supervised import sft

        return 0 if sft(config).complete else RESUMABLE

    return with_restarts(config, work)
