"""How answers are sampled, and which ways of sampling are compared. The fields of ``sampling.decode.Decoding``."""

import itertools
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, converted, setting

ORDERS = ("low_confidence", "maskgit_plus", "top_margin", "entropy", "random")
ON_EOS = ("allow", "last", "forbid")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(Settings):
    """The sampler. ``None``: follows from the others."""

    title: ClassVar[str] = "sampler"

    gen_length: int | None = setting(
        None, "tokens of the answer region; default: the longest right answer, in whole blocks", at_least=1, common=True
    )
    block_length: int = setting(
        0, "blocks are filled from left to right; 0: 32, or the model's own", at_least=0, common=True
    )
    steps: int | None = setting(None, "over the whole answer; default: one token a step", at_least=1, common=True)
    temperature: float = setting(0.0, "0 takes the most likely token", at_least=0, common=True)
    threshold: float | None = setting(
        None, "unmask every token at least this sure; --steps is then the most", above=0, common=True
    )
    cfg_scale: float = setting(0.0, "classifier-free guidance; doubles the forwards", at_least=0)
    remasking: str = setting("low_confidence", "what is unmasked first", choices=ORDERS)
    block_cache: bool = setting(False, "reuse keys outside the block; faster, approximate")
    on_eos: str = setting("allow", "when answers may end", choices=ON_EOS)


NAMES = tuple(item.name for item in fields(SamplerSettings))


@dataclass(frozen=True, kw_only=True)
class SamplerGridSettings(SamplerSettings):
    """One way of sampling, or several that are compared."""

    sampler_grid: str | None = setting(
        None,
        "evaluate with every combination of these, such as steps=32,64 threshold=none,0.9",
        many=True,
        common=True,
    )

    def check(self) -> None:
        """The grid has names of the sampler's settings, each with values of its type."""
        samplers(self)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(SamplerSettings):
    """Several answers to each prompt."""

    title: ClassVar[str] = "sampling"

    num_samples: int = setting(8, "answers sampled to each prompt", at_least=2, common=True)
    gen_length: int = setting(128, "tokens of the answer region", at_least=1, common=True)
    temperature: float = setting(1.0, "0 takes the most likely token: all answers to a prompt alike", at_least=0)
    batch_size: int = setting(64, "answers made at a time by one process: speed and memory", at_least=1)

    def decoding(self) -> dict[str, Any]:
        """The options of ``sample``."""
        options = {name: getattr(self, name) for name in NAMES}
        steps = self.gen_length if self.steps is None else self.steps
        return options | {"block_length": min(self.block_length, self.gen_length), "steps": steps}

    def sampler(self) -> dict[str, Any]:
        """What tells one way to sample from another, for records: all that is not at its default, and the usual."""
        return {name: value for name, value in self.decoding().items() if value not in (None, False)}


def samplers(settings: SamplerGridSettings) -> list[dict[str, Any]]:
    """The ways of sampling that are asked for: the settings alone, or one for each cell of the grid, in its order."""
    base = {name: getattr(settings, name) for name in NAMES}
    grid = _grid(settings.sampler_grid) if settings.sampler_grid else {}
    return [base | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _grid(text: str) -> dict[str, list[Any]]:
    """``steps=32,64,threshold=none,0.9`` → values by name. UserError for what is no such thing."""
    grid: dict[str, list[Any]] = {}
    for part in (part.strip() for part in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = (list(grid)[-1] if grid else ""), part
        elif name in grid:
            raise UserError(f"--sampler_grid names {name} twice; give its values together: {name}=A,B")
        if name not in NAMES or not value:
            raise UserError(
                f"--sampler_grid {part!r}: write NAME=VALUE,VALUE with names of {', '.join(NAMES)}, such as steps=32,64"
            )
        word = None if value.lower() == "none" else value
        grid.setdefault(name, []).append(converted(SamplerSettings, name, word))
    return grid
