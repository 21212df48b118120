"""Bytes by part and place: what an engine holds, beside the live tensors of a dry run.

The parts of DeepSpeed follow its source (0.19: ``zero/stage_1_and_2.py``, ``zero/stage3.py``), those of FSDP2 torch's
(2.13: ``fsdp/_fully_shard``). A part lives in some of three moments, and the memory needed is that of the worst:

start       the model is loaded and handed to the engine
backward    forwards and backwards of a micro-batch, from the second step on
update      the optimizer's step

N is the number of processes, P the trained parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffdpo.engine.choice import FSDP2
from diffdpo.engine.sharding import Sharding
from diffdpo.planner.dry_run import DryRun
from diffdpo.planner.hardware import CONTEXT, PROCESS, SLACK
from diffdpo.planner.job import PlannedRun
from diffdpo.planner.shapes import Numbers

DEVICE, HOST, DISK = "device", "host", "disk"
PLACES = {"device": DEVICE, "cpu": HOST, "nvme": DISK}
MOMENTS = ("start", "backward", "update")
STEP = ("backward", "update")
PINNED_ROUNDED = 64 * 2**20
"""Largest page-locked buffer that is rounded up (``command.ALLOCATOR``)."""


@dataclass(frozen=True)
class Part:
    """``bytes`` of one purpose in one place, at some moments. ``assumed``: a margin, not a tensor."""

    name: str
    place: str
    bytes: int
    moments: tuple[str, ...] = MOMENTS
    assumed: bool = False


def needed(parts: Sequence[Part], place: str, *, assumed: bool = True) -> tuple[int, str]:
    """(bytes, moment) of the worst moment of a place."""
    return max(
        (sum(p.bytes for p in parts if p.place == place and moment in p.moments and (assumed or not p.assumed)), moment)
        for moment in MOMENTS
    )


def memory_parts(job: PlannedRun, numbers: Numbers, run: DryRun) -> list[Part]:
    """Everything one process holds, where and when. Parts of no bytes are left out."""
    weights = numbers.trained_bytes + numbers.frozen_bytes
    parts = [*_held(job, numbers), *_reference(job, numbers, weights), *_live(job, run)]
    if job.cuda and job.config.activation_offload == "cpu":
        one = (_rounded(tokens * numbers.hidden * job.width) for tokens in job.tokens_at_once)
        parts.append(Part("layers' inputs, page-locked", HOST, numbers.layers * sum(one), ("backward",)))
    if job.cuda:
        parts += [
            Part("CUDA context and libraries", DEVICE, CONTEXT, assumed=True),
            Part("process", HOST, PROCESS, assumed=True),
        ]
    return [part for part in parts if part.bytes]


def _held(job: PlannedRun, n: Numbers) -> list[Part]:
    if job.choice.kind == FSDP2:
        return _fsdp2(job, n)
    if not job.sharding.any:
        return _whole(job, n)
    return _parameters_cut(job, job.sharding, n) if job.sharding.parameters else _state_cut(job, job.sharding, n)


def _whole(job: PlannedRun, n: Numbers) -> list[Part]:
    """torch's AdamW on whole weights; DeepSpeed's stage 0 holds the same."""
    parts = [
        Part("weights", DEVICE, n.trained_bytes + n.frozen_bytes),
        Part("optimizer", DEVICE, n.state_bytes, STEP),
        Part("gradients", DEVICE, n.trained_bytes, ("update",)),
    ]
    if job.world > 1:
        parts.append(Part("gradients, flat for the sum", DEVICE, n.trained_bytes, ("update",)))
    if not job.cuda:  # AdamW without a fused kernel: sqrt(v) and its quotient, of one parameter at a time
        parts.append(Part("optimizer's work", DEVICE, 8 * n.largest_trained, ("update",)))
    return parts


def _reference(job: PlannedRun, n: Numbers, weights: int) -> list[Part]:
    if job.reference != "copy":
        return []
    if not job.sharding.parameters:
        return [Part("reference copy", DEVICE, weights)]
    if job.choice.kind == FSDP2:
        return [Part("reference copy", PLACES[job.sharding.parameters_on], n.total * job.width // job.shards)]
    return [
        Part("reference copy", PLACES[job.sharding.parameters_on], weights // job.world, STEP),
        Part("reference copy", HOST if job.cuda else DEVICE, weights, ("start",)),
    ]


def _live(job: PlannedRun, run: DryRun) -> list[Part]:
    """Tensors of the forwards and backwards, by kind, at their peak."""
    peaks = [run.policy.at_peak] + ([run.reference.at_peak] if run.reference else [])
    peak = max(peaks, key=lambda at_peak: sum(at_peak.values()))
    parts = [Part(name, DEVICE, size, ("backward",)) for name, size in peak.items()]
    if job.cuda:
        parts.append(Part("allocator's slack", DEVICE, int(SLACK * sum(peak.values())), ("backward",), assumed=True))
    return parts


def _state_cut(job: PlannedRun, zero: Sharding, n: Numbers) -> list[Part]:
    """Flat weights whole, fp32 masters and Adam's moments of 1/N; ZeRO-2 also keeps 1/N of the gradients only."""
    share, w = n.trained // job.world, job.width
    offload = zero.offloads_optimizer
    place = HOST if offload else DEVICE
    parts = [
        Part("weights", DEVICE, n.trained_bytes + n.frozen_bytes),
        # flattened group by group: the old tensors go when the flat one stands
        Part("weights, while they are flattened", DEVICE, n.trained_bytes, ("start",)),
        Part("optimizer: fp32 weights", place, _pinned(4 * share, zero, place), STEP),
        Part("optimizer: moments", place, 8 * share, STEP),
        Part("gradient buckets", DEVICE, _touched(zero.buffers * zero.reduce_bucket, n, job) * w, ("backward",)),
    ]
    if offload:
        parts += [
            Part("gradient buffer for the largest weight", DEVICE, n.largest_trained * w, STEP),
            Part("gradient buffer for the largest weight", HOST, _pinned(n.largest_trained * w, zero, HOST), STEP),
            Part("gradients in fp32", HOST, _pinned(4 * share, zero, HOST), STEP),
            Part("updated weights on their way back", HOST, _pinned(share * w, zero, HOST), STEP),
        ]
        if job.backwards > 1:
            parts.append(Part("gradients summed over backwards", HOST, _pinned(share * w, zero, HOST), STEP))
        return parts
    kept = share * w * (2 if job.backwards > 1 else 1) if zero.gradients else 0
    update = share * w + (4 * share if w == 2 else 0)
    return [
        *parts,
        Part("gradients", DEVICE, kept, ("backward",)),
        Part("gradients", DEVICE, share * w if zero.gradients else n.trained_bytes, ("update",)),
        Part("gradients, flat in fp32", DEVICE, update, ("update",)),
    ]


def _parameters_cut(job: PlannedRun, zero: Sharding, n: Numbers) -> list[Part]:
    """1/N of everything, weights gathered as they are needed."""
    share, w = n.trained // job.world, job.width
    weights = n.trained_bytes + n.frozen_bytes
    group = max(min(zero.sub_group, share), n.largest_trained // job.world)
    gathered = min(weights, (zero.max_live + n.largest_module) * w)
    home, states = PLACES[zero.parameters_on], PLACES[zero.optimizer_on]
    gradients = DEVICE if states == DEVICE else HOST
    parts = [
        # read to the host, then weight by weight to the device and on to its shard
        Part("weights, before they are sharded", HOST if job.cuda else DEVICE, weights, ("start",)),
        Part("largest layer, on its way", DEVICE, n.largest_module * w, ("start",)),
        Part("weights", home, _pinned(weights // job.world, zero, home), STEP if home == HOST else MOMENTS),
        Part("weights gathered for use", DEVICE, gathered if job.world > 1 or home != DEVICE else 0, ("backward",)),
        Part("gradient bucket", DEVICE, 2 * _touched(zero.reduce_bucket, n, job) * w, ("backward",)),
        Part("gradients", gradients, _pinned(share * w, zero, gradients), STEP),
        Part("optimizer: fp32 weights", states, 4 * share, STEP),
        Part("optimizer: moments", states, 8 * share, STEP),
    ]
    if home == DISK:
        parts.append(Part("buffers for weights on disk", HOST, (zero.parameter_buffers + zero.max_in_cpu) * w, STEP))
    if states == HOST:
        return [*parts, Part("gradients in fp32", HOST, _pinned(4 * share, zero, HOST), STEP)]
    if states == DISK:
        return [
            *parts,
            Part("gradients in fp32", DISK, 4 * share, STEP),
            Part("buffers for optimizer on disk", HOST, _pinned(4 * group, zero, HOST) * zero.swap_buffers, STEP),
            Part("gradients in fp32 of a sub-group", HOST, 4 * group, STEP),
        ]
    return [*parts, Part("gradients in fp32 of a sub-group", DEVICE, 4 * group * (1 if w == 4 else 2), STEP)]


def _fsdp2(job: PlannedRun, n: Numbers) -> list[Part]:
    """1/N of everything, N processes to a copy; weights are read straight into shards. Trained ones are fp32 and cast
    as they are gathered: one unit in use, of its neighbours what is being copied in and not freed yet."""
    cut, shards, w, home = job.sharding, job.shards, job.width, PLACES[job.sharding.parameters_on]
    trained = 0 if job.adapter_is_whole else n.trained
    unit = n.largest_unit
    kept = n.total * w + unit * w if not job.choice.reshard_after_forward else (3 if shards > 1 else 1) * unit * w
    parts = [
        Part("weights", home, _pinned((4 * trained + n.frozen_bytes) // shards, cut, home)),
        Part("weights gathered for use", DEVICE, kept, ("backward",)),
    ]
    if job.adapter_is_whole:
        return [
            *parts,
            Part("adapter", DEVICE, n.trained_bytes),
            Part("optimizer", DEVICE, 8 * n.trained, STEP),
            Part("gradients", DEVICE, n.trained_bytes, ("update",)),
            Part("gradients, flat for the sum", DEVICE, n.trained_bytes if job.world > 1 else 0, ("update",)),
        ]
    states = PLACES[cut.optimizer_on]
    return [
        *parts,
        Part("gradients of a unit, and in fp32 on their way", DEVICE, unit * (w + 2 * 4), ("backward",)),
        Part("gradients", states, 4 * trained // shards, STEP),
        Part("optimizer: moments", states, 8 * trained // shards, STEP),
    ]


def _pinned(size: int, zero: Sharding, place: str) -> int:
    """torch's allocator of page-locked memory rounds up to a power of two, up to what ``command.ALLOCATOR`` says."""
    return _rounded(size) if zero.pinned and place == HOST else size


def _rounded(size: int) -> int:
    """What page-locked memory of so many bytes takes."""
    return size if size <= 1 or size > PINNED_ROUNDED else 1 << (size - 1).bit_length()


def _touched(elements: int, n: Numbers, job: PlannedRun) -> int:
    """A CPU's untouched pages are no memory; on a GPU a buffer is there whole."""
    return elements if job.cuda else min(elements, n.trained)
