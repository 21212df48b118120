"""Warnings that many objects of a process, and all ranks of a run, would give: given once."""

import logging
import os
from functools import cache

from data_pipeline.addresses import hidden

log = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Warn, unless this process has said it before or is not the first of its run."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", hidden(message))
