"""Where the parts of benchmarks/gpu_evidence.py run."""

from dataclasses import dataclass

import torch

GIB = 2**30
CARD = 16 * GIB


@dataclass(frozen=True)
class Setting:
    """Where the parts run; ``tiny``: on shapes that show whether they work."""

    kind: str
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    def of_16_gb(self) -> None:
        """From here on this process has no more of the GPU than such a card, of which the context takes a GiB."""
        if self.kind == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - GIB) / total))
