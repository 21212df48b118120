"""Command lines of the project, held against its flags."""

import dataclasses
from collections.abc import Sequence

from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig


def train_config(words: Sequence[str]) -> TrainConfig:
    """The settings of a line that starts ``launch/train.py``, from the project's root. UserError for a wrong flag."""
    flags = list(words[list(words).index("launch/train.py") + 1 :])
    return parse_config(TrainConfig, flags, "")


def knows_auto() -> bool:
    """Whether ``--resume_from_checkpoint auto``, which the job scripts rest on, is there."""
    (flag,) = [item for item in dataclasses.fields(TrainConfig) if item.name == "resume_from_checkpoint"]
    return "auto" in flag.metadata["help"]
