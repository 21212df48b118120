"""Weights that come from the host for every pass over them: do the rows of a pass compute long enough to hide it, and
what does the host hold for each way of keeping the optimizer's state.

A pass needs a layer's weights once, whatever the number of its rows, so there is a number of rows from which the
transfer of the next layer is done before this one is computed. A forward without a graph is the hardest case: a
backward computes two to three times as long for one transfer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffdpo.cards import Gpu
from diffdpo.engine.choice import DEEPSPEED
from diffdpo.planner.dry_run import DryRun
from diffdpo.planner.hardware import LINK_SHARE, MATMUL_SHARE
from diffdpo.planner.job import PlannedRun
from diffdpo.planner.memory import DISK, HOST, memory_parts, needed
from diffdpo.planner.shapes import Numbers

BLOCKWISE = 2 * (1 + 4 / 256)
"""Bytes a parameter of two moments in 8 bits, with an fp32 scale for every 256 numbers of each."""


SHRINK = {"optimizer: fp32 weights": "weights", "optimizer: moments": "moments", "gradients in fp32": "gradients"}
NO_8_BIT = "DeepSpeed's Adam on the host keeps its moments in fp32"
NO_AGAIN = "DeepSpeed cannot compute layers again (--gradient_checkpointing) from weights it reads for every pass"
ROUNDS = "DeepSpeed rounds updates to nearest: below 1/256 of a weight they are lost"


@dataclass(frozen=True)
class Layer:
    """Seconds of one layer on one GPU: ``transfer`` of its weights, ``row``: a forward of one row of full length."""

    bytes: int
    transfer: float
    row: float
    rows: int  # of the run's forwards with a graph

    @property
    def meet(self) -> int:
        """Rows of a forward from which computing takes as long as the transfer."""
        return math.ceil(self.transfer / self.row)

    @property
    def hidden(self) -> bool:
        """Whether the run's own forwards hide it."""
        return self.rows >= self.meet


@dataclass(frozen=True)
class Way:
    """Where the state of all trained weights may be kept: bytes of all processes of the host. ``obstacle``: why it
    cannot be had today; empty where a DeepSpeed JSON asks for it."""

    name: str
    host: int
    disk: int
    obstacle: str = ""


def streams(job: PlannedRun) -> bool:
    """Whether weights come from the host or a disk for every pass: ZeRO-3 with its parameters offloaded."""
    return job.choice.kind == DEEPSPEED and job.sharding.parameters and job.sharding.parameters_on != "device"


def streamed_layer(job: PlannedRun, n: Numbers, gpu: Gpu) -> Layer:
    """The largest layer. Compute is matrix products alone at the planner's share of the peak, so ``meet`` is rather too
    high than too low; every process fetches its own part over its own link and gathers the rest from the others."""
    size = n.layer * job.width
    rate = MATMUL_SHARE * (gpu.half if job.bf16 else gpu.single)
    flops = 2 * n.layer_met * job.row_length + 4 * n.layer_attention * job.row_length**2
    return Layer(size, size / job.shards / (LINK_SHARE * gpu.link), flops / rate, job.rows_at_once)


def ways(job: PlannedRun, n: Numbers, run: DryRun) -> list[Way]:
    """Host and disk memory of a run whose weights are streamed, by how the optimizer's state is kept."""

    def way(name: str, optimizer: str, parameters: str, obstacle: str = "", **shrunk: float) -> Way:
        sharding = replace(job.sharding, optimizer_on=optimizer, parameters_on=parameters)
        there = memory_parts(replace(job, choice=replace(job.choice, sharding=sharding)), n, run)
        parts = [replace(p, bytes=round(p.bytes * shrunk.get(SHRINK.get(p.name, ""), 1))) for p in there]
        return Way(name, job.world * needed(parts, HOST)[0], job.world * needed(parts, DISK)[0], obstacle)

    return [
        way("fp32 weights and moments on the host", "cpu", "cpu"),
        way("fp32 weights and moments on NVMe", "nvme", "cpu"),
        way("that, and the weights on NVMe", "nvme", "nvme", NO_AGAIN if job.config.gradient_checkpointing else ""),
        way("8-bit moments on the host", "cpu", "cpu", NO_8_BIT, moments=BLOCKWISE / 8),
        way("bf16 weights and moments on the host", "cpu", "cpu", ROUNDS, weights=0.5, moments=0.5, gradients=0.5),
    ]


def lines(job: PlannedRun, n: Numbers, run: DryRun, gpu: Gpu | None) -> Iterator[str]:
    """As text; nothing where weights stay on the device."""
    if not streams(job):
        return
    if gpu is not None:
        layer = streamed_layer(job, n, gpu)
        yield (
            f"streamed   a layer's weights ({layer.bytes / 2**20:.0f} MiB) take {1e3 * layer.transfer:.1f} ms by PCIe "
            f"({gpu.name}); a row of {job.row_length} tokens computes {1e3 * layer.row:.1f} ms in it, forward"
        )
        hidden = _hidden(job, layer)
        yield f"           they meet at {layer.meet} rows; a forward has {layer.rows}: the transfer is {hidden}"
    for way in ways(job, n, run):
        told = f"NOT to be had: {way.obstacle}" if way.obstacle else "by a DeepSpeed JSON"
        yield f"  {way.name:42} host {way.host / 2**30:6.1f}  NVMe {way.disk / 2**30:6.1f} GiB  {told}"


def _hidden(job: PlannedRun, layer: Layer) -> str:
    """Whether it is, and what would make it so: rows cost memory, and no forward has more than the micro-batch."""
    if layer.hidden:
        return "hidden"
    if layer.meet <= job.rows:
        return f"NOT hidden, which --segment_rows {layer.meet} would do if it fits (plan it)"
    pairs = math.ceil(layer.meet / job.pair_rows)
    return f"NOT hidden: that takes --per_device_train_batch_size {pairs} with --segment_rows {layer.meet}, if they fit"
