"""What to change when a run does not fit: changes of flags that the planner has tried itself.

Changes come in tiers, the gentlest first: what leaves every number of the training as it is, where things are kept,
what is trained. A tier is entered only when all of the tiers before it, taken together, do not suffice. From the first
setting that fits, every change that turns out not to be needed is taken back, the slowest first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.choice import FSDP2, PLAIN
from diffdpo.errors import UserError
from diffdpo.planner.plan import Machine, Plan, make_plan
from diffdpo.shipped import shipped_folder

Change = Mapping[str, Any]
DS_CONFIGS = shipped_folder("ds_configs")
SHARDED = ("4080_offload.json", "4080_zero3_offload.json", "zero3_nvme.json")


SIZED = ("segment_rows", "per_device_train_batch_size", "gradient_accumulation_steps")  # by --max_memory


@dataclass(frozen=True)
class Advice:
    """Flags to set, and the plan with them."""

    change: dict[str, Any]
    plan: Plan

    def flags(self) -> str:
        """As they are typed."""
        return " ".join(f"--{name} {_text(value)}" for name, value in self.change.items())


def advise(plan: Plan, *, scored: int | None = None) -> Advice | None:
    """The gentlest change that makes ``plan`` fit its machine; None when nothing tried does."""
    search = _Search(plan.job.config, plan.machine, plan.job.cuda, scored)
    sized: Change = {}
    if plan.fit:  # its sizes are the job's own settings now, from which the search starts
        sized = {"max_memory": 0.0} | {name: getattr(plan.job.config, name) for name in SIZED}
    gentle = [change for change in _same_training(plan) if search.plan([change]) is not None]
    for group in _tiers(plan.job.config):
        for change in group:
            if search.fits([*gentle, change]):
                advice = search.finish(gentle, change)
                return replace(advice, change={**sized, **advice.change})
    return None


@dataclass
class _Search:
    config: TrainConfig
    machine: Machine
    cuda: bool
    scored: int | None

    def fits(self, changes: list[Change]) -> bool:
        """Whether the run fits with all of them."""
        plan = self.plan(changes)
        return plan is not None and not plan.short()

    def plan(self, changes: list[Change], *, timed: bool = False) -> Plan | None:
        """The plan with all of them; None for a combination that the run itself refuses, which is no advice."""
        try:
            config = make_config(TrainConfig, asdict(self.config) | _merged(changes))
            return make_plan(config, self.machine, cuda=self.cuda, scored=self.scored, timed=timed)
        except UserError:
            return None

    def finish(self, gentle: list[Change], change: Change) -> Advice:
        """Take back what is not needed, then let segments grow as far as they fit."""
        kept = list(gentle)
        for one in reversed(gentle):
            rest = [each for each in kept if each is not one]
            if self.fits([*rest, change]):
                kept = rest
        merged = _merged([*kept, change])
        while "segment_rows" in merged and self.fits([merged | {"segment_rows": 2 * merged["segment_rows"]}]):
            merged["segment_rows"] *= 2
        plan = self.plan([merged], timed=True)
        assert plan is not None, "it fits, so it was planned"
        return Advice(merged, plan)


def _same_training(plan: Plan) -> Iterator[Change]:
    """Same numbers, less memory; the last is the first to be taken back."""
    config, job = plan.job.config, plan.job
    if job.reference == "copy" and "precomputed" in _choices("reference"):
        yield {"reference": "precomputed"}
    if job.rows_at_once > 1:
        yield {"segment_rows": 1}
    if job.choice.kind != PLAIN and not job.bf16:
        yield {"bf16": True}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if job.cuda and config.activation_offload == "none":
        yield {"activation_offload": "cpu"}
    if config.segmentation == "none":
        yield {"segmentation": "auto"}
    elif job.strategy != "two_pass" and job.rows > 1:
        yield {"segmentation": "two_pass"}
    if config.per_device_train_batch_size > 1:
        steps = config.gradient_accumulation_steps * config.per_device_train_batch_size
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}


def _tiers(config: TrainConfig) -> Iterator[list[Change]]:
    yield [{}]
    offload: Change = {"fsdp_cpu_offload": True}
    if config.engine == FSDP2:
        yield [offload]
    else:
        yield [{"ds_config": _shipped(name)} for name in SHARDED]
        offload = {"ds_config": _shipped(SHARDED[0])}
    adapters: list[Change] = [{"use_peft": True}, {"use_peft": True, "load_in_4bit": True}]
    yield [change | dict(offload) for change in map(dict, adapters) if not config.load_in_4bit]


def _shipped(name: str) -> str:
    """A DeepSpeed JSON of the project, as it is typed from here."""
    path, here = DS_CONFIGS / name, Path.cwd()
    if not path.is_file():
        raise UserError(f"{path} is not there, so no advice can be tried; plan from a checkout of the project")
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _merged(changes: list[Change]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def _choices(name: str) -> tuple[str, ...]:
    return next(item.metadata.get("choices", ()) for item in fields(TrainConfig) if item.name == name)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
