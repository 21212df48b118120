"""Whether the final model goes to the Hugging Face hub, and where to."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class HubSettings(Settings):
    """Publishing."""

    title: ClassVar[str] = "hub"

    push_to_hub: bool = setting(False, "put the final model, with its card, on the Hugging Face hub")
    hub_model_id: str | None = setting(None, "its name there; default: the name of --output_dir, in your account")
    hub_private_repo: bool | None = setting(None, "whether others cannot see it; default: as your account has it")
    hub_token: str | None = setting(
        None, "token to write with, never recorded; default: that of `hf auth login` or HF_TOKEN", secret=True
    )

    def check(self) -> None:
        """What is about pushing needs it."""
        for name in ("hub_model_id", "hub_private_repo", "hub_token"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise UserError(f"--{name} is about a push to the hub; add --push_to_hub")
        if self.hub_model_id and (self.hub_model_id.count("/") > 1 or self.hub_model_id.startswith(("/", "."))):
            raise UserError(f"--hub_model_id {self.hub_model_id}: give NAME or OWNER/NAME")
