"""Expected time of a step: every operation takes as long as its arithmetic or its bytes, whichever is longer.

    t(operation) = max(FLOPs / (share * peak), bytes / (share * bandwidth))

summed over the dry run's operations; transfers to the host, the optimizer there and the disk are added or overlapped
as stated in each function. An estimate from data sheets and the shares of `hardware`: good for comparing settings and
for the order of magnitude.
"""

from collections import Counter
from dataclasses import dataclass

from diffdpo.cards import Gpu
from diffdpo.engine.choice import FSDP2
from diffdpo.planner.dry_run import DryRun
from diffdpo.planner.hardware import BANDWIDTH_SHARE, LINK_SHARE, MATMUL_SHARE, Host
from diffdpo.planner.job import PlannedRun
from diffdpo.planner.shapes import Numbers
from diffdpo.planner.trace import Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step of one process, by what they go to; ``link`` beyond what compute hides."""

    policy: float
    reference: float
    link: float
    optimizer: float
    disk: float
    pairs: int
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.policy + self.reference + self.link + self.optimizer + self.disk

    @property
    def pairs_per_second(self) -> float:
        """The rate of this process."""
        return self.pairs / self.seconds

    @property
    def utilisation(self) -> float:
        """Share of the peak rate over the whole step."""
        return self.flops / self.seconds / self.peak


def step_time(job: PlannedRun, numbers: Numbers, run: DryRun, gpu: Gpu, host: Host) -> StepTime:
    """A step's time of one process with its own GPU, link and share of the host."""
    micro = job.config.gradient_accumulation_steps
    policy = micro * _compute(run.policy_work, gpu)
    reference = micro * _compute(run.reference_work, gpu)
    link = _link_bytes(job, numbers) / (LINK_SHARE * gpu.link)
    flops = micro * sum(w.flops * n for work in (run.policy_work, run.reference_work) for w, n in work.items())
    return StepTime(
        policy=policy,
        reference=reference,
        link=max(0.0, link - policy - reference),
        optimizer=_optimizer(job, numbers, gpu, host),
        disk=_disk_bytes(job, numbers) / host.disk,
        pairs=micro * job.config.per_device_train_batch_size,
        flops=flops,
        peak=gpu.half if job.bf16 else gpu.single,
    )


def _compute(work: Counter[Work], gpu: Gpu) -> float:
    def seconds(kind: Work) -> float:
        rate = gpu.half if kind.half else gpu.single
        return max(kind.flops / (MATMUL_SHARE * rate), kind.bytes / (BANDWIDTH_SHARE * gpu.bandwidth))

    return sum(seconds(kind) * times for kind, times in work.items())


def _passes(job: PlannedRun) -> int:
    """Times the weights are gone through in a step: each forward once, each backward once, in which a layer's
    recomputation uses what its gradient needs next (counted: benchmarks/streamed.py); reference and the first pass of
    two_pass are forwards."""
    forwards = -(-job.rows // job.reference_rows) if job.reference in ("copy", "adapter_off", "adapter_start") else 0
    forwards += job.segments * (2 if job.strategy in ("two_pass", "checkpoint") else 1)
    return (forwards + job.segments) * job.config.gradient_accumulation_steps


def _link_bytes(job: PlannedRun, n: Numbers) -> int:
    """Over PCIe in the busier direction: gradients down at each backward (and back up to be added to, and once in
    fp32), updated weights up once; with parameters offloaded, all weights up at every pass (FSDP2's trained ones in
    fp32, cast on the device); with activations offloaded, layers' inputs down and up again."""
    cut = job.sharding
    share, w, total = n.trained // job.world, job.width, _activation_bytes(job, n)
    if not cut.any:
        return total
    if cut.offloads_optimizer:
        total += share * (4 + w + w * (job.backwards if job.backwards > 1 else 0))
    if cut.parameters_on != "device":
        trained = n.trained_bytes if job.choice.kind != FSDP2 else 0 if job.adapter_is_whole else 4 * n.trained
        total += _passes(job) * (trained + n.frozen_bytes) // job.world
    return total


def _activation_bytes(job: PlannedRun, n: Numbers) -> int:
    """Layers' inputs of a step's forwards with a graph, one way."""
    if not (job.cuda and job.config.activation_offload == "cpu"):
        return 0
    tokens = job.rows * job.row_length + job.pairs * job.clean_tokens
    return job.config.gradient_accumulation_steps * n.layers * n.hidden * tokens * job.width


def _optimizer(job: PlannedRun, n: Numbers, gpu: Gpu, host: Host) -> float:
    """AdamW reads and writes fp32 weights and moments and reads gradients: 28 bytes a parameter, and casts."""
    share = n.trained // job.shards if job.sharding.any and not job.adapter_is_whole else n.trained
    offloaded = job.sharding.offloads_optimizer and not job.adapter_is_whole
    rate = host.bandwidth if offloaded else BANDWIDTH_SHARE * gpu.bandwidth
    return share * (28 + 3 * job.width) / rate


def _disk_bytes(job: PlannedRun, n: Numbers) -> int:
    """Optimizer state read and written once a step (16 bytes a parameter each way); weights read at every pass."""
    cut, total = job.sharding, 0
    if cut.optimizer_on == "nvme":
        total += 2 * 16 * n.trained // job.world
    if cut.parameters_on == "nvme":
        total += _passes(job) * (n.trained_bytes + n.frozen_bytes) // job.world
    return total
