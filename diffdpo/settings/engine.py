"""What holds and updates the weights: engine, precision, optimizer, rate and batch."""

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from diffdpo.errors import UserError
from diffdpo.settings.base import setting
from diffdpo.settings.schedule import ScheduleSettings

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon")
"""transformers' names; the first two are one: AdamW is fused where the device can."""
FSDP_FLAGS = {"fsdp_cpu_offload": False, "fsdp_reshard_after_forward": True, "fsdp_shard_size": 0}

T = TypeVar("T", bound="EngineSettings")


def over_processes(settings: T, processes: int) -> T:
    """The settings with the micro-batches of so many processes where ``--global_batch_size`` decides: of the size that
    was given, or of the largest below it that comes out even. UserError where no step of that size can be."""
    if not settings.global_batch_size:
        return settings
    own, rest = divmod(settings.global_batch_size, processes)
    if rest:
        raise UserError(
            f"--global_batch_size {settings.global_batch_size} cannot be dealt to {processes} processes; take a "
            "multiple, or another number of processes"
        )
    micro = next(size for size in range(min(own, settings.per_device_train_batch_size), 0, -1) if own % size == 0)
    return replace(settings, per_device_train_batch_size=micro, gradient_accumulation_steps=own // micro)


def accumulation_passed_over(asked: "EngineSettings", settings: "EngineSettings") -> list[str]:
    """A sentence where ``--global_batch_size`` decides against an accumulation that was asked for."""
    wanted, taken = asked.gradient_accumulation_steps, settings.gradient_accumulation_steps
    if not asked.global_batch_size or wanted in (taken, EngineSettings.gradient_accumulation_steps):
        return []
    return [
        f"--gradient_accumulation_steps {wanted} is passed over: a step of --global_batch_size "
        f"{asked.global_batch_size} has {taken} micro-batches of {settings.per_device_train_batch_size} here"
    ]


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ScheduleSettings):
    """The engine and the optimizer."""

    title: ClassVar[str] = "optimisation and engine"

    engine: str = setting(
        "auto",
        "auto: deepspeed when --ds_config is given; fsdp2: everything in shards, by torch alone",
        choices=("auto", "deepspeed", "plain", "fsdp2"),
    )
    ds_config: str | None = setting(
        None, "DeepSpeed JSON: sharding and offload, the rest follows from flags; default: none", common=True
    )
    fsdp_cpu_offload: bool = setting(False, "fsdp2: shards, their gradients and AdamW on the host")
    fsdp_reshard_after_forward: bool = setting(
        True, "fsdp2: free gathered weights after a forward; false: kept until its backward (less traffic, more memory)"
    )
    fsdp_shard_size: int = setting(
        0, "fsdp2: processes that share one copy of the weights, such as those of a host; 0: all", at_least=0
    )
    sequence_parallel_size: int = setting(
        1, "plain engine: processes that hold a row's tokens together, for rows longer than one can hold", at_least=1
    )
    bf16: bool | None = setting(None, "bfloat16 weights; default: on a GPU that has it")
    per_device_train_batch_size: int = setting(8, "records in a micro-batch of one process", at_least=1, common=True)
    gradient_accumulation_steps: int = setting(1, "micro-batches in a step", at_least=1, common=True)
    optim: str = setting(
        "adamw_torch",
        "the optimizer: AdamW, AdamW with 8-bit moments, Adafactor or Muon; all but AdamW on the plain engine only",
        choices=OPTIMIZERS,
    )
    global_batch_size: int = setting(
        0,
        "records in a step over all processes, however many there are: micro-batches in a step follow from it, smaller "
        "ones where they must; 0: what the two flags above come to",
        at_least=0,
    )
    weight_decay: float = setting(0.01, "AdamW's, on matrices only", at_least=0)
    adam_beta1: float = setting(0.9, "AdamW's beta1", at_least=0, below=1)
    adam_beta2: float = setting(0.95, "AdamW's beta2", at_least=0, below=1)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never", at_least=0)

    def check(self) -> None:
        """An engine and its configuration go together."""
        if self.engine == "deepspeed" and not self.ds_config:
            raise UserError(
                "--engine deepspeed needs --ds_config, for instance --ds_config ds_configs/4080_offload.json"
            )
        if self.engine not in ("auto", "deepspeed") and self.ds_config:
            raise UserError(f"--engine {self.engine} does not read --ds_config; leave one of the two out")
        sharded = "FSDP2" if self.engine == "fsdp2" else ("DeepSpeed" if self.ds_config else "")
        if not self.optim.startswith("adamw_torch") and sharded:
            raise UserError(
                f"--optim {self.optim} needs whole weights (rows, columns, blocks of 256), and {sharded} steps on "
                f"shards of them; leave it out, or {'--ds_config' if self.ds_config else '--engine fsdp2'}"
            )
        if self.sequence_parallel_size > 1 and sharded:
            raise UserError(
                f"--sequence_parallel_size cuts rows under the plain engine only, and this run is under {sharded}; "
                f"leave it out, or {'--ds_config' if self.ds_config else '--engine fsdp2'}"
            )
        for name, usual in FSDP_FLAGS.items():
            if self.engine != "fsdp2" and getattr(self, name) != usual:
                raise UserError(f"--{name} is about --engine fsdp2; add that, or leave it out")
