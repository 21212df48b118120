"""From settings and hardware to a plan: what is needed, whether it is there, how long a step takes."""

from dataclasses import dataclass
from functools import cached_property

from diffdpo.build import BUNDLED_MODEL, choose_bf16
from diffdpo.config import TrainConfig
from diffdpo.models.adapter_folder import base_of_adapter, is_adapter
from diffdpo.plan.dry_run import DryRun, dry_run
from diffdpo.plan.hardware import GPUS, Gpu, Host
from diffdpo.plan.job import Job, resolve
from diffdpo.plan.memory import DEVICE, HOST, Part, memory_parts, needed
from diffdpo.plan.roofline import StepTime, step_time
from diffdpo.plan.shapes import Numbers, count, read_shape, skeleton, weight_elements
from diffdpo.reference.modes import share_of_memory


@dataclass(frozen=True)
class Machine:
    """What there is: one of ``gpus`` equal GPUs a process, all on one host. None: not given, so not judged."""

    gpu: Gpu | None
    host: Host | None
    gpus: int = 1


@dataclass(frozen=True)
class Plan:
    """A planned run. Bytes are of one process, the host's of all."""

    job: Job
    numbers: Numbers
    run: DryRun
    machine: Machine

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

    def time(self, gpu: Gpu) -> StepTime:
        """Of a step on such a GPU."""
        return step_time(self.job, self.numbers, self.run, gpu, self.machine.host or Host(0))


def make_plan(
    config: TrainConfig, machine: Machine, *, cuda: bool = True, scored: int | None = None, timed: bool = True
) -> Plan:
    """Run the step without data. ``scored`` as in `job.resolve`; without ``timed`` the work is not counted."""
    policy = config.model_name_or_path or str(BUNDLED_MODEL)
    family, shape = read_shape(policy)
    memory = (machine.gpu or max(GPUS.values(), key=lambda gpu: gpu.memory)).memory

    def second_model() -> float:
        name = config.ref_model_name_or_path or policy
        size = 2 * weight_elements(*read_shape(base_of_adapter(name) if is_adapter(name) else name))  # files in 16 bits
        return share_of_memory(config, size, memory=memory, processes=machine.gpus)

    bf16 = choose_bf16(config, able=cuda)
    module = skeleton(family, shape, config, bf16=bf16, cast=bf16)
    job = resolve(config, module, cuda=cuda, world=machine.gpus, second_model=second_model, scored=scored)
    numbers = count(module)
    return Plan(job, numbers, dry_run(module, numbers, job, timed=timed), machine)
