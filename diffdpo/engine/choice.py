"""Which engine a run uses and what that implies, as a value made once from the settings. No torch in here.

Whoever must know how weights are held (the strategies, the reference, the planner, the checkpoint) asks this value. The
DeepSpeed JSON is opened here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdpo.engine.ds_config import complete_ds_config, read_ds_config
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.sharding import Sharding, sharding_of
from diffdpo.errors import UserError
from diffdpo.settings.engine import EngineSettings

PLAIN, DEEPSPEED, FSDP2 = "plain", "deepspeed", "fsdp2"
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
NVME = "nvme"
SMALL_SHARE = 0.25  # of trained parameters: whole gradients of a LoRA adapter do not matter beside the frozen weights


@dataclass(frozen=True)
class EngineChoice:
    """An engine before there is one. ``ds_config``: the DeepSpeed configuration as it is handed over, completed;
    ``given``: the JSON as the user wrote it; both empty for other engines. ``reshard_after_forward``: of FSDP2.
    ``row_processes``: over how many processes a row's tokens lie."""

    kind: str = PLAIN
    processes: int = 1
    bf16: bool = False
    sharding: Sharding = field(default_factory=Sharding)
    ds_config: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    reshard_after_forward: bool = True
    row_processes: int = 1

    @property
    def shards_parameters(self) -> bool:
        """Whether weights are whole nowhere."""
        return self.sharding.parameters

    @property
    def meets_in_forwards(self) -> bool:
        """Whether a forward is a collective: every process must call it equally often."""
        return self.shards_parameters or self.row_processes > 1

    @property
    def has_copies(self) -> bool:
        """Whether groups of processes hold a copy of the weights each, cut within the group."""
        return 0 < self.sharding.over < self.processes

    @property
    def reduces_in_backward(self) -> bool:
        """Whether a backward moves gradients away from the device that made them: to a rank's shard, to the host."""
        cut = self.sharding.parameters or (self.sharding.gradients and self.processes > 1)
        return cut or self.sharding.offloads_optimizer

    @property
    def checkpoint_is_per_rank(self) -> bool:
        """Whether what is saved looks otherwise for another number of processes."""
        return self.kind == DEEPSPEED and not self.on_nvme

    @property
    def makes_moments_at_once(self) -> bool:
        """Whether the optimizer's moments are there before the first step."""
        return self.kind == DEEPSPEED

    @property
    def fixes_batch_sizes(self) -> bool:
        """Whether the user's JSON says how a step is cut into micro-batches."""
        return any(self.given.get(name, "auto") != "auto" for name in SIZES)

    def no_sync_obstacle(self, *, few: bool) -> str | None:
        """What stands against whole gradients in ``.grad`` until the end of a step, for the user; None where nothing
        does. ``few``: what is trained is small beside the model (LoRA)."""
        if self.kind == PLAIN:
            shared = "the gradient of an answer lies on all processes that share its rows (--sequence_parallel_size)"
            return shared if self.row_processes > 1 else None
        if self.kind == FSDP2:
            return None if few else "three whole gradients on every device would undo the sharding of FSDP2"
        if not self.sharding.any:
            return "DeepSpeed's stage 0 reduces gradients in every backward (stages 1 to 3 can wait)"
        if few or not self.reduces_in_backward:
            return None
        offloads = "offload_optimizer" in self.ds_config.get("zero_optimization", {})
        what = "offload" if offloads else f"sharding of ZeRO-{self.sharding.stage}"
        return f"three whole gradients on every device would undo the {what}"

    def retry_obstacle(self, no_sync_obstacle: str | None) -> str | None:
        """What stands against taking a step again that broke off, for the user; None if nothing."""
        if self.row_processes > 1:
            return "processes that share rows (--sequence_parallel_size) wait for one another inside forwards"
        if self.kind == FSDP2:
            waiting = "FSDP2 gathers weights inside forwards, where other processes wait for this one"
            return waiting if self.processes > 1 else None
        if self.shards_parameters:
            return f"ZeRO-{self.sharding.stage} gathers weights inside forwards and cannot take one up again"
        if self.processes > 1 and no_sync_obstacle is not None:
            return f"other processes wait for this one's gradients in every backward of ZeRO-{self.sharding.stage}"
        return None

    def reads_bf16(self, *, trained: bool) -> bool:
        """Whether weights are read in bf16: where they are trained, FSDP2 holds fp32 and casts what it gathers, and the
        plain engine has bf16 for frozen ones only."""
        return self.bf16 and not (trained and self.kind in (PLAIN, FSDP2))

    @property
    def on_nvme(self) -> bool:
        """Whether DeepSpeed keeps state on a disk."""
        return NVME in (self.sharding.optimizer_on, self.sharding.parameters_on)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of this engine to be read again."""
        cut = self.sharding
        return {
            "kind": self.kind,
            "sharded": [name for name in ("optimizer", "gradients", "parameters") if getattr(cut, name)],
            "optimizer_on": cut.optimizer_on,
            "parameters_on": cut.parameters_on,
        }

    def reads(self, identity: Mapping[str, Any], processes: int | None = None) -> bool:
        """Whether a checkpoint written by an engine of this ``identity`` can be read. ``processes``: how many wrote it,
        where its files differ by that.

        By name (``engine.tensor_files``) any engine reads any other's.
        """
        same = identity == self.identity() and processes in (None, self.processes)
        by_name = identity.get("kind") in (PLAIN, FSDP2) or bool(identity.get("sharded"))
        return same or by_name

    def describe(self) -> str:
        """In a few words, for the user."""
        if self.kind == PLAIN:
            return "plain torch" + (f", rows over {self.row_processes} processes" if self.row_processes > 1 else "")
        if self.kind == FSDP2:
            return ", ".join(["FSDP2", *self._fsdp2_in_words()])
        parts = {"optimizer": self.sharding.optimizer_on, "parameters": self.sharding.parameters_on}
        moved = [f"{what} on {where}" for what, where in parts.items() if where != "device"]
        return ", ".join([f"DeepSpeed ZeRO-{self.sharding.stage}", *moved])

    def _fsdp2_in_words(self) -> list[str]:
        cut, words = self.sharding, []
        if cut.over != self.processes:
            words.append(f"{self.processes // cut.over} copies in {cut.over} shards each")
        if cut.offloads_optimizer:
            words.append("everything on cpu between uses")
        if not self.reshard_after_forward:
            words.append("weights kept from forward to backward")
        return words


def check_shard_size(size: int, processes: int) -> None:
    """UserError for a ``--fsdp_shard_size`` that does not divide the processes into equal groups."""
    if size and processes % size:
        raise UserError(
            f"--fsdp_shard_size {size} does not divide the {processes} processes of this run; give a divisor, or 0 for "
            "one copy of the weights over all"
        )


def check_row_processes(size: int, processes: int) -> None:
    """UserError for a ``--sequence_parallel_size`` that does not divide the processes into equal groups."""
    if processes % size:
        raise UserError(
            f"--sequence_parallel_size {size} does not divide the {processes} process(es) of this run; start more, or "
            "give a divisor"
        )


def fsdp2_choice(
    *,
    processes: int,
    bf16: bool = False,
    offload: bool = False,
    shard_size: int = 0,
    reshard_after_forward: bool = True,
) -> EngineChoice:
    """Weights, gradients and AdamW's state in shards. UserError for a size that does not divide the processes."""
    check_shard_size(shard_size, processes)
    where = "cpu" if offload else "device"
    sharding = Sharding(True, True, True, where, where, over=shard_size or processes)
    return EngineChoice(FSDP2, processes, bf16, sharding, reshard_after_forward=reshard_after_forward)


def engine_kind(settings: EngineSettings) -> str:
    """What ``--engine`` comes to."""
    if settings.engine == "auto":
        return DEEPSPEED if settings.ds_config else PLAIN
    return settings.engine


def shards_parameters(settings: EngineSettings) -> bool:
    """Whether the settings come to an engine that cuts weights, known before the processes are."""
    if (kind := engine_kind(settings)) != DEEPSPEED:
        return kind == FSDP2
    return sharding_of(read_ds_config(Path(settings.ds_config or ""))).parameters


def choose_engine(
    settings: EngineSettings, *, processes: int, cuda: bool, bf16_able: bool, adapter: bool = False
) -> EngineChoice:
    """The engine of a run. ``bf16_able``: whether the hardware has bfloat16, for where neither flag nor JSON says;
    ``adapter``: what is trained is one, in fp32 on frozen weights.

    UserError for a JSON that cannot be read or contradicts the flags.
    """
    if engine_kind(settings) == PLAIN:
        if settings.bf16 and not adapter:
            raise UserError(
                "--bf16 trains with fp32 masters of bfloat16 weights, which needs --ds_config or --engine fsdp2; leave "
                "it out, or add --use_peft"
            )
        bf16 = adapter and (bf16_able if settings.bf16 is None else settings.bf16)
        check_row_processes(settings.sequence_parallel_size, processes)
        return EngineChoice(PLAIN, processes, bf16, row_processes=settings.sequence_parallel_size)
    if engine_kind(settings) == FSDP2:
        return fsdp2_choice(
            processes=processes,
            bf16=bf16_able if settings.bf16 is None else settings.bf16,
            offload=settings.fsdp_cpu_offload,
            shard_size=settings.fsdp_shard_size,
            reshard_after_forward=settings.fsdp_reshard_after_forward,
        )
    given = read_ds_config(Path(settings.ds_config or ""))
    return deepspeed_choice(
        given,
        OptimizerOptions.of(settings),
        micro_batch_size=settings.per_device_train_batch_size,
        accumulation_steps=settings.gradient_accumulation_steps,
        processes=processes,
        bf16=_bf16(settings, given, able=bf16_able),
        cuda=cuda,
    )


def deepspeed_choice(
    given: Mapping[str, Any],
    options: OptimizerOptions,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    processes: int = 1,
    bf16: bool = False,
    cuda: bool = False,
) -> EngineChoice:
    """DeepSpeed as a JSON ``given`` by the user shards it. UserError where that contradicts the rest."""
    completed = complete_ds_config(
        given,
        options,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        world_size=processes,
        bf16=bf16,
        cuda=cuda,
    )
    return EngineChoice(DEEPSPEED, processes, bf16, sharding_of(completed, cuda=cuda), completed, given)


def _bf16(settings: EngineSettings, given: Mapping[str, Any], *, able: bool) -> bool:
    """``--bf16``, else the JSON's, else ``able``."""
    in_json = given.get("bf16", {}).get("enabled", "auto")
    if in_json == "auto":
        return able if settings.bf16 is None else settings.bf16
    if settings.bf16 is not None and settings.bf16 is not in_json:
        raise UserError(f"--bf16 is {settings.bf16} and --ds_config sets bf16.enabled to {in_json}; leave one out")
    return in_json
