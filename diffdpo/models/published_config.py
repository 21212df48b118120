"""Reading a published `config.json` strictly: what is missing or contradictory is an error that names the key."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from diffdpo.errors import UserError

Setting = Any
"""Type of a field that must be given: None until it is, then what `require` checks it to be."""


class PublishedConfig(PreTrainedConfig):
    """A config whose fields all start as None, so that nothing is guessed, and which writes back only what is set.

    (A null written for a key that was absent overrides the published code's default.)
    """

    def to_diff_dict(self) -> dict:
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def require(self, kinds: Mapping[str, type]) -> None:
        """Every key of `kinds` is there and of its type (an int counts as a float)."""
        missing = [key for key in kinds if getattr(self, key, None) is None]
        if missing:
            raise UserError(f"{self.model_type} config lacks {', '.join(missing)}: add the key(s) to config.json")
        for key, kind in kinds.items():
            value = getattr(self, key)
            fits = type(value) is kind or (kind is float and type(value) is int)
            self.refuse([(not fits, f"has {key}={value!r}; it must be a {kind.__name__}")])

    def refuse(self, rules: Iterable[tuple[object, str]]) -> None:
        """Raise for the first (wrong, message) whose `wrong` is true."""
        for wrong, message in rules:
            if wrong:
                raise UserError(f"{self.model_type} config {message}")
