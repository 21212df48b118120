"""Which model, and how its layers are run and adapted."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.hub import pinned
from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, field_of, setting


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model that is trained, and how its layers run."""

    title: ClassVar[str] = "model"

    model_name_or_path: str | None = setting(
        None, "policy to train: folder or hub name; default: the bundled model", common=True
    )
    model_revision: str | None = setting(
        None, "branch, tag or commit of --model_name_or_path on the hub; default: its main branch"
    )
    adapter_name_or_path: str | None = setting(
        None, "LoRA adapter that training goes on with; the reference is the adapter as it starts; default: none"
    )
    block_size: int | None = setting(
        None, "tokens of a block, 0: full attention; default: as config.json says, which a2d-* do not", at_least=0
    )
    train_router: bool = setting(
        False, "train the routers of a mixture of experts too; metrics then have router/balance_loss, 1 where level"
    )
    gradient_checkpointing: bool = setting(False, "recompute each layer in the backward pass (saves memory)")
    activation_offload: str = setting(
        "none", "cpu: what --gradient_checkpointing keeps of each layer waits on the host", choices=("none", "cpu")
    )
    checkpoint_keeps: str = setting(
        "nothing",
        "what --gradient_checkpointing does not compute again, for memory: attention; products: those of matrices too",
        choices=("nothing", "attention", "products"),
    )
    torch_compile: bool = setting(False, "compile the layers: minutes at the start, then less time and memory")
    use_liger_kernel: bool = setting(False, "LM head through Liger's fused kernel (GPU; for trained heads)")
    attn_implementation: str = setting(
        "sdpa",
        "what hides later blocks in block-causal models: a mask (sdpa), or flex_attention (GPU; for long answers)",
        choices=("sdpa", "flex_attention"),
    )

    def check(self) -> None:
        """A revision is of a model that is named, and no folder."""
        if self.activation_offload != "none" and not self.gradient_checkpointing:
            raise UserError(
                f"--activation_offload {self.activation_offload} moves what --gradient_checkpointing keeps of each "
                "layer; add --gradient_checkpointing true"
            )
        if self.train_router and self.adapter_name_or_path:
            raise UserError(
                f"--train_router is of a new adapter, and {self.adapter_name_or_path} has its own routers or none: "
                "leave one out"
            )
        if self.flex and self.torch_compile:
            raise UserError(
                "--attn_implementation flex_attention has not been seen to work with --torch_compile; leave one out"
            )
        if self.checkpoint_keeps != "nothing":
            self._check_keeps()
        name = self.model_name_or_path
        if self.model_revision and (not name or Path(name).exists()):
            raise UserError(f"--model_revision is of a model on the hub, and {name or 'the bundled one'} is none")

    def _check_keeps(self) -> None:
        """What is kept of layers that are run again needs such layers, run as they are."""
        told = f"--checkpoint_keeps {self.checkpoint_keeps}"
        if not self.gradient_checkpointing:
            raise UserError(
                f"{told} is about what --gradient_checkpointing computes again; add --gradient_checkpointing true"
            )
        unseen = {"torch_compile": self.torch_compile, "attn_implementation flex_attention": self.flex}
        unseen["activation_offload"] = self.activation_offload != "none"
        for other in (name for name, asked in unseen.items() if asked):
            raise UserError(f"{told} has not been seen to work with --{other}; leave one out")

    @property
    def flex(self) -> bool:
        """Whether blocks are hidden by FlexAttention."""
        return self.attn_implementation == "flex_attention"

    @property
    def policy(self) -> str | None:
        """The model to train by one name, NAME@REVISION where a revision is set; None: the bundled one."""
        return pinned(self.model_name_or_path, self.model_revision)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, on weights that stay as they are."""
        return self.adapter_name_or_path is not None


@dataclass(frozen=True, kw_only=True)
class LoraSettings(ModelSettings):
    """An adapter instead of all weights."""

    title: ClassVar[str] = "adapter (LoRA)"

    use_peft: bool = setting(False, "train a LoRA adapter instead of all weights", common=True)
    lora_r: int = setting(16, "rank of the adapter", at_least=1)
    lora_alpha: int = setting(32, "scale of the adapter", above=0)
    lora_target_modules: str | None = setting(
        None, "names in a block, or a regular expression of full names; default: every linear layer", many=True
    )
    lora_modules_to_save: str | None = setting(
        None, "modules trained whole beside the adapter, by name; default: none", many=True
    )
    use_dora: bool = setting(False, "DoRA: learn the size of each weight row apart from its direction")
    use_rslora: bool = setting(False, "rsLoRA: scale the adapter by lora_alpha / sqrt(lora_r)")
    load_in_4bit: bool = setting(False, "hold the frozen weights in NF4 (needs --use_peft)", common=True)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained: a new one, or one that is there."""
        return self.use_peft or super().adapts

    def check(self) -> None:
        """What is about an adapter needs one; frozen NF4 weights need one to have something to train."""
        if self.load_in_4bit and not self.adapts:
            raise UserError("--load_in_4bit freezes the weights, so there is nothing to train; add --use_peft")
        for name, given in (
            ("lora_r", self.lora_r != field_of(type(self), "lora_r").default),
            ("lora_alpha", self.lora_alpha != field_of(type(self), "lora_alpha").default),
            ("use_dora", self.use_dora),
            ("use_rslora", self.use_rslora),
            ("lora_target_modules", self.lora_target_modules),
            ("lora_modules_to_save", self.lora_modules_to_save),
        ):
            if given and self.adapter_name_or_path:
                raise UserError(f"--{name} is of a new adapter; {self.adapter_name_or_path} has its own: leave one out")
            if given and not self.use_peft:
                raise UserError(f"--{name} is about a LoRA adapter; add --use_peft")
