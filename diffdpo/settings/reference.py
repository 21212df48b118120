"""The frozen reference: which model, and where its scores come from."""

from dataclasses import dataclass
from typing import ClassVar

from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings(Settings):
    """What the policy is compared with."""

    title: ClassVar[str] = "reference"

    ref_model_name_or_path: str | None = setting(None, "frozen reference; default: the policy as it starts")
    reference: str = setting(
        "auto",
        "where reference scores come from; see docs/training.md",
        choices=("auto", "copy", "adapter_off", "adapter_start", "precomputed", "none"),
        common=True,
    )
    reference_cache: str | None = setting(
        None, "folder of precomputed reference scores; default: one per setting in the data cache"
    )
    sync_ref_model: bool = setting(False, "TR-DPO: the reference follows the policy (plain engine)")
    ref_model_mixup_alpha: float = setting(
        0.6, "of --sync_ref_model: how far it moves towards the policy", above=0, below=1.0001
    )
    ref_model_sync_steps: int = setting(512, "of --sync_ref_model: steps between its moves", at_least=1)
    precompute_only: bool = setting(False, "with --reference precomputed: make the scores and end")

    def check(self) -> None:
        """Flags that a mode would not read are refused."""
        if self.ref_model_name_or_path and self.reference not in ("auto", "copy", "precomputed"):
            raise UserError(f"--ref_model_name_or_path is not read under --reference {self.reference}; leave one out")
        if self.reference_cache and self.reference not in ("auto", "precomputed"):
            raise UserError(f"--reference_cache is not read under --reference {self.reference}; leave one of them out")
        if self.sync_ref_model and self.reference not in ("auto", "copy"):
            raise UserError(
                f"--sync_ref_model moves a reference of its own, which --reference {self.reference} is not; leave one "
                "of them out"
            )
        if not self.sync_ref_model and (self.ref_model_mixup_alpha, self.ref_model_sync_steps) != (0.6, 512):
            raise UserError("--ref_model_mixup_alpha and --ref_model_sync_steps are of --sync_ref_model; add it")
        if self.precompute_only and self.reference != "precomputed":
            raise UserError("--precompute_only makes what --reference precomputed reads; add --reference precomputed")
