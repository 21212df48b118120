"""Reading a published `config.json` strictly: what is missing or contradictory is an error that names the key."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from diffdpo.errors import UserError

Setting = Any
"""Type of a field that must be given: None until it is, then what `require` checks it to be."""

RELATIVES: dict[str, tuple] = {
    "num_experts": (0, None),
    "block_size": (None,),
    "partial_rotary_factor": (1.0, None),
    "logit_shift": (0, 1, None),
}
"""Keys of other models under the same `model_type` (LLaDA-MoE, block diffusion): value allowed here."""


class PublishedConfig(PreTrainedConfig):
    """A config whose fields all start as None, so that nothing is guessed, and which writes back only what is set.

    (A null written for a key that was absent overrides the published code's default.)
    """

    def to_diff_dict(self) -> dict:
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def require(self, kinds: Mapping[str, type]) -> None:
        """Every key of `kinds` is there and of its type (an int counts as a float); numbers are above 0, ids apart."""
        self.allow_only(RELATIVES)  # first: a relative lacks keys that nobody could add
        missing = [key for key in kinds if getattr(self, key, None) is None]
        if missing:
            raise UserError(f"{self.model_type} config lacks {', '.join(missing)}: add the key(s) to config.json")
        for key, kind in kinds.items():
            value = getattr(self, key)
            fits = type(value) is kind or (kind is float and type(value) is int)
            empty = kind in (int, float) and fits and value <= 0 and not key.endswith("token_id")
            self.refuse(
                [
                    (not fits, f"has {key}={value!r}; expected: {kind.__name__}"),
                    (empty, f"has {key}={value!r}; it must be above 0"),
                ]
            )

    def allow_only(self, supported: Mapping[str, tuple]) -> None:
        """Every key of `supported` that is set has one of its values."""
        for key, allowed in supported.items():
            found = getattr(self, key, None)
            self.refuse([(found not in allowed, f"has {key}={found!r}; supported: {_listed(allowed)}")])

    def check_token_ids(self, rows: int) -> None:
        """Mask, end and padding are tokens of an embedding with `rows` rows, where they are set."""
        for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(self, key, None)
            for token in found if isinstance(found, list) and key == "eos_token_id" else [found]:
                known = token is None or (type(token) is int and 0 <= token < rows)
                self.refuse([(not known, f"has {key}={found!r}, no token of the vocabulary of {rows}")])

    def refuse(self, rules: Iterable[tuple[object, str]]) -> None:
        """Raise for the first (wrong, message) whose `wrong` is true."""
        for wrong, message in rules:
            if wrong:
                raise UserError(f"{self.model_type} config {message}")


def _listed(allowed: tuple) -> str:
    return ", ".join(repr(value) for value in allowed if value is not None) or "no such key"
