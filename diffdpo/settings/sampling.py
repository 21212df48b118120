"""How answers are sampled: the fields of ``diffdpo.sampling.decode.Decoding`` as settings."""

from dataclasses import dataclass
from typing import Any, ClassVar

from diffdpo.settings.base import Settings, setting

ORDERS = ("low_confidence", "maskgit_plus", "top_margin", "entropy", "random")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """The sampler and its noise."""

    title: ClassVar[str] = "sampling"

    num_samples: int = setting(8, "answers sampled to each prompt", at_least=2, common=True)
    gen_length: int = setting(128, "tokens of the answer region", at_least=1, common=True)
    block_length: int = setting(0, "blocks are filled from left to right; 0: 32, or the model's", at_least=0)
    steps: int | None = setting(None, "over the whole answer; default: one token a step", at_least=1)
    temperature: float = setting(1.0, "0 takes the most likely token: all answers to a prompt alike", at_least=0)
    cfg_scale: float = setting(0.0, "classifier-free guidance; doubles the forwards", at_least=0)
    remasking: str = setting("low_confidence", "what is unmasked first", choices=ORDERS)
    threshold: float | None = setting(None, "unmask every token at least this sure", above=0, below=1)
    block_cache: bool = setting(False, "reuse keys outside the block; faster, approximate")
    on_eos: str = setting("allow", "when answers may end", choices=("allow", "last", "forbid"))
    batch_size: int = setting(64, "answers made at a time by one process: speed and memory", at_least=1)

    def decoding(self) -> dict[str, Any]:
        """The options of ``sample``."""
        names = ("gen_length", "temperature", "cfg_scale", "remasking", "threshold", "block_cache", "on_eos")
        options = {name: getattr(self, name) for name in names}
        steps = self.gen_length if self.steps is None else self.steps
        return options | {"block_length": min(self.block_length, self.gen_length), "steps": steps}

    def sampler(self) -> dict[str, Any]:
        """What tells one way to sample from another, for records: all that is not at its default, and the usual."""
        return {name: value for name, value in self.decoding().items() if value not in (None, False)}
