"""Reading a published `config.json` strictly: what is missing or contradictory is an error that names the key."""

from collections.abc import Iterable

from transformers import PreTrainedConfig

from diffdpo.errors import UserError


class PublishedConfig(PreTrainedConfig):
    """A config whose fields all start as None, so that nothing is guessed, and which writes back only what is set.

    (A null written for a key that was absent overrides the published code's default.)
    """

    def to_diff_dict(self) -> dict:
        return {key: value for key, value in super().to_diff_dict().items() if value is not None}

    def require(self, keys: Iterable[str]) -> None:
        missing = [key for key in keys if getattr(self, key, None) is None]
        if missing:
            raise UserError(f"{self.model_type} config lacks {', '.join(missing)}: add the key(s) to config.json")

    def refuse(self, rules: Iterable[tuple[object, str]]) -> None:
        """Raise for the first (wrong, message) whose `wrong` is true."""
        for wrong, message in rules:
            if wrong:
                raise UserError(f"{self.model_type} config {message}")
