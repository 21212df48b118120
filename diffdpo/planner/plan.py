"""From settings and hardware to a plan: what is needed, whether it is there, how long a step takes."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from diffdpo.cards import GPUS, Gpu
from diffdpo.config import TrainConfig
from diffdpo.engine.choice import DEEPSPEED
from diffdpo.engine.preflight import check_recomputed
from diffdpo.errors import UserError
from diffdpo.memory.largest_fit import Fit, largest_fit
from diffdpo.models.architecture.block_attention import check_flex
from diffdpo.models.architecture.published_config import block_size_of, context_of
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter, is_adapter
from diffdpo.planner.dry_run import DryRun, dry_run
from diffdpo.planner.hardware import Host
from diffdpo.planner.job import PlannedRun, plan_run, planned_engine
from diffdpo.planner.memory import DEVICE, HOST, Part, memory_parts, needed
from diffdpo.planner.roofline import StepTime, step_time
from diffdpo.planner.shapes import Numbers, count, read_shape, skeleton, weight_elements
from diffdpo.reference.modes import share_of_memory
from diffdpo.settings.engine import over_processes
from diffdpo.step.fit import fit_micro_batch
from diffdpo.step.strategy import micro_batch_shape, with_micro_batch


@dataclass(frozen=True)
class Machine:
    """What there is: one of ``gpus`` equal GPUs a process, all on one host. None: not given, so not judged."""

    gpu: Gpu | None
    host: Host | None
    gpus: int = 1


@dataclass(frozen=True)
class Plan:
    """A planned run. Bytes are of one process, the host's of all."""

    job: PlannedRun
    numbers: Numbers
    run: DryRun
    machine: Machine
    fit: Fit | None = None  # of ``--max_memory``
    context: int | None = None  # tokens the model was made for

    @cached_property
    def parts(self) -> list[Part]:
        """Memory by part, of one process."""
        return memory_parts(self.job, self.numbers, self.run)

    def need(self, place: str) -> int:
        """Bytes of the worst moment, of one GPU or of the host or disk for all processes."""
        return needed(self.parts, place)[0] * (1 if place == DEVICE else self.machine.gpus)

    def short(self, gpu: Gpu | None = None) -> int:
        """Bytes missing on the GPU and on the host together; 0 when it fits."""
        gpu, host = gpu or self.machine.gpu, self.machine.host
        missing = max(0, self.need(DEVICE) - gpu.memory) if gpu else 0
        return missing + (max(0, self.need(HOST) - host.memory) if host else 0)

    def lacks(self, gpu: Gpu) -> str:
        """Where a run with such GPUs does not fit: ``GPU``, ``host`` (of the machine, where it is given), or ''."""
        if self.need(DEVICE) > gpu.memory:
            return "GPU"
        return "host" if self.short(gpu) else ""

    def time(self, gpu: Gpu) -> StepTime:
        """The time of a step on such a GPU."""
        host = (self.machine.host or Host(0)).share(self.machine.gpus)
        return step_time(self.job, self.numbers, self.run, gpu, host)


def check_plannable(config: TrainConfig, machine: Machine) -> None:
    """UserError for what can be known to be missing before the minutes of planning."""
    if config.max_memory and machine.gpu is None:
        raise UserError("--max_memory is a share of a GPU's memory; give --gpu or --gpu_memory to plan it")
    read_shape(model_or_bundled(config.policy), block_size=config.block_size)


def make_plan(
    config: TrainConfig, machine: Machine, *, cuda: bool = True, scored: int | None = None, timed: bool = True
) -> Plan:
    """Run the step without data. ``scored`` as in `job.plan_run`; without ``timed`` the work is not counted.

    With ``--max_memory`` the job is that of the sizes that a run would find: its config names them.
    """
    fit, config = None, over_processes(config, machine.gpus)
    if config.max_memory:
        fit, config = _sized(config, machine, cuda=cuda)
    policy = model_or_bundled(config.policy)
    family, shape = read_shape(policy, block_size=config.block_size)
    if config.flex:
        check_flex(torch.device("cuda"), block_size=block_size_of(shape))
    memory = (machine.gpu or max(GPUS.values(), key=lambda gpu: gpu.memory)).memory

    def second_model() -> float:
        name = config.ref_model_name_or_path or policy
        base = base_of_adapter(name) if is_adapter(name) else name
        size = 2 * weight_elements(*read_shape(base, block_size=config.block_size))  # files in 16 bits
        return share_of_memory(choice, size, memory=memory)

    choice = planned_engine(config, cuda=cuda, processes=machine.gpus)
    if config.recomputes:
        check_recomputed(choice.ds_config)
    module = skeleton(family, shape, config, bf16=choice.bf16, cast=choice.bf16 and choice.kind == DEEPSPEED, cuda=cuda)
    options = {"second_model": second_model, "scored": scored, "block_size": block_size_of(shape)}
    job = plan_run(config, module, choice, cuda=cuda, **options)  # type: ignore[arg-type]
    numbers = count(module, optim=config.optim)
    context = context_of(shape)
    return Plan(job, numbers, dry_run(module, numbers, job, timed=timed), machine, fit, context)


def _sized(config: TrainConfig, machine: Machine, *, cuda: bool) -> tuple[Fit, TrainConfig]:
    """The run's own search with planned peaks in place of measured ones, and what it chooses as settings."""
    check_plannable(config, machine)
    assert machine.gpu is not None
    blocks = block_size_of(read_shape(model_or_bundled(config.policy), block_size=config.block_size)[1])
    shape = micro_batch_shape(config, couples_pairs=config.loss().couples_pairs, block_size=blocks)
    choice = planned_engine(config, cuda=cuda, processes=machine.gpus)
    free = not shape.couples_pairs and config.segmentation != "deferred" and not choice.fixes_batch_sizes
    accumulation = config.gradient_accumulation_steps if free else 1
    asked, config = config.max_memory, replace(config, max_memory=0.0)

    def peak(rows: int) -> int:
        probe = replace(config, segment_rows=rows, segmentation="two_pass")
        probe = with_micro_batch(probe, accumulation * shape.pairs) if free else probe
        plan = make_plan(probe, machine, cuda=cuda, scored=config.max_length - 1, timed=False)
        held = sum(part.bytes for part in plan.parts if part.place == DEVICE and "backward" in part.moments)
        return held + (2 * plan.numbers.trained_bytes if plan.job.whole_gradients else 0)

    budget = int(asked * machine.gpu.memory)
    fit = largest_fit(peak, budget=budget, most=accumulation * shape.rows)
    pairs = fit_micro_batch(fit, shape, accumulation) if free else shape.pairs
    return fit, replace(with_micro_batch(config, pairs), segment_rows=fit.rows)
