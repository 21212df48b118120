"""How the rows of a step share memory."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(Settings):
    """Segments: forwards of bounded size, and how they become one gradient."""

    title: ClassVar[str] = "memory"

    segmentation: str = setting(
        "auto",
        "how rows share memory; see docs/memory.md",
        choices=("auto", "none", "checkpoint", "two_pass", "deferred"),
        common=True,
    )
    segment_rows: int = setting(0, "rows in one forward; 0: by a number of tokens", at_least=0)


@dataclass(frozen=True, kw_only=True)
class MemorySettings(SegmentSettings):
    """Segments, and a search for their size."""

    max_memory: float = setting(
        0.0,
        "find segments and micro-batches that fit in this share of the device's memory by measuring; 0: do not; "
        "see docs/memory.md",
        at_least=0,
        below=1,
    )

    def check(self) -> None:
        """A size is set or searched for, not both."""
        if self.max_memory and self.segment_rows:
            raise UserError("--max_memory finds the size of segments, --segment_rows sets it; leave one out")
