"""A plan as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from diffdpo.cards import GPUS, Gpu
from diffdpo.planner import hardware
from diffdpo.planner.advise import Advice
from diffdpo.planner.memory import DEVICE, DISK, HOST, MOMENTS, needed
from diffdpo.planner.plan import Plan
from diffdpo.planner.sizes import gib
from diffdpo.planner.streaming import lines, streamed_layer, streams, ways

TITLES = {DEVICE: "GPU", HOST: "host", DISK: "NVMe"}
ASSUMPTIONS = (
    f"{hardware.MATMUL_SHARE:.0%} of the data sheet's rate in matrix products, "
    f"{hardware.BANDWIDTH_SHARE:.0%} of memory bandwidth, {hardware.LINK_SHARE:.0%} of PCIe's; "
    f"host memory {hardware.Host(0).bandwidth / 1e9:.0f} GB/s, NVMe {hardware.Host(0).disk / 1e9:.0f} GB/s",
    "every row as long as --max_length, every token of the longest answer scored (an upper bound)",
    f"{gib(hardware.CONTEXT):.1f} GiB of GPU memory for CUDA itself, {hardware.SLACK:.0%} of a step's live tensors "
    f"lost to fragmentation, {gib(hardware.PROCESS):.0f} GiB of host memory a process",
    "transfers over PCIe hidden behind compute as far as they go; sums between GPUs not counted",
    "planned, not measured",
)
TIGHT = 0.97  # of a memory; what is left above it is no margin
COMPILED = "planned as without --torch_compile, an upper bound: graphs held 12 to 15 % less for the backward on a CPU"


def as_text(plan: Plan, advice: Advice | None) -> str:
    """What `launch/plan.py` prints."""
    streaming = list(lines(plan.job, plan.numbers, plan.run, plan.machine.gpu))
    after = ["", *streaming] if streaming else []
    return "\n".join([*_header(plan), "", *_memory(plan), "", *_verdict(plan, advice), *after, "", *_times(plan)])


def _header(plan: Plan) -> Iterator[str]:
    job, n, config = plan.job, plan.numbers, plan.job.config
    kind = "NF4" if config.load_in_4bit else "bf16" if job.bf16 else "fp32"
    what = f"LoRA rank {config.lora_r}" if config.adapts else "all"
    yield f"model      {n.total / 1e9:.3f}B parameters in {n.layers} layers, {kind}"
    yield f"trained    {n.trained / 1e6:.1f}M parameters ({what})"
    yield f"engine     {job.choice.describe()}; {plan.machine.gpus} process(es)"
    yield f"rows       {job.rows} of {job.row_length} tokens a micro-batch, {job.rows_at_once} in a forward"
    if job.block_size:
        once = "once" if job.shares_clean else "in every forward those of its rows"
        yield f"blocks     of {job.block_size}; {job.clean_tokens} clean tokens a pair, run {once}"
    if plan.context is not None and job.length > plan.context:
        yield f"warning    --max_length {job.length}: the model was made for {plan.context} tokens at most"
    if plan.fit is not None:
        peak, budget = gib(dict(plan.fit.tried)[plan.fit.rows]), gib(plan.fit.budget)
        sizes = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} pairs a step"
        found = f"{plan.fit.rows} rows a segment, {sizes}" if plan.fit.fits else "not even one row fits"
        yield f"max_memory {found}: {peak:.2f} of {budget:.2f} GiB planned for {plan.fit.rows} rows"
    layers = ", layers recomputed" if config.gradient_checkpointing else ""
    if config.torch_compile:
        yield f"compiled   {COMPILED}"
    yield f"memory     segmentation '{job.strategy}' ({job.why}){layers}; reference {job.reference}"


def _memory(plan: Plan) -> Iterator[str]:
    for place, title in TITLES.items():
        total, moment = needed(plan.parts, place)
        if not total:
            continue
        yield f"{title}, GiB of one process at the worst moment ({moment})"
        for part in plan.parts:
            if part.place == place and moment in part.moments:
                yield f"  {part.name:42} {gib(part.bytes):9.2f}{'  assumed' if part.assumed else ''}"
        yield f"  {'sum':42} {gib(total):9.2f}"


def _verdict(plan: Plan, advice: Advice | None) -> Iterator[str]:
    gpu, host, fits = plan.machine.gpu, plan.machine.host, True
    places = [(gpu.name, DEVICE, gpu.memory)] if gpu else []
    places += [("host", HOST, host.memory)] if host else []
    for name, place, memory in places:
        need = plan.need(place)
        fits = fits and need <= memory
        yield f"{name}: needs {gib(need):.1f} of {gib(memory):.1f} GiB, {_fit(need, memory)}"
    if fits:
        return
    if advice is None:
        yield "nothing tried makes it fit: smaller --max_length, more GPUs or host memory, or a smaller model"
        return
    yield f"it fits with: {advice.flags()}"
    needs = ", ".join(f"{title} {gib(advice.plan.need(place)):.1f}" for place, title in TITLES.items())
    yield f"  GiB needed then: {needs}"
    if gpu and advice.plan.need(DEVICE) > TIGHT * gpu.memory:
        yield f"  on the GPU {_fit(advice.plan.need(DEVICE), gpu.memory)}"
    if gpu:
        yield f"  expected then: {advice.plan.time(gpu).seconds:.1f} s a step"


def _fit(need: int, memory: int) -> str:
    """Whether it fits, and whether hardly."""
    if need > memory:
        return "DOES NOT FIT"
    spare = (memory - need) / 2**20
    return (
        "fits"
        if need <= TIGHT * memory
        else f"fits, hardly: {spare:.0f} MiB to spare, which a screen or another program takes"
    )


def _times(plan: Plan) -> Iterator[str]:
    """A line for every known GPU and the one asked about."""
    yield f"{'GPU':24} {'GiB':>6} {'fits':>5} {'s/step':>8} {'pairs/s':>8} {'use':>5}   of which, s"
    for gpu in _gpus(plan):
        time = plan.time(gpu)
        fits = {"": "yes", "GPU": "no", "host": "host"}[plan.lacks(gpu)]
        detail = ", ".join(
            f"{name} {getattr(time, name):.2f}"
            for name in ("policy", "reference", "link", "optimizer", "disk")
            if getattr(time, name) >= 0.005
        )
        rate = time.pairs_per_second * plan.machine.gpus
        yield (
            f"{gpu.name:24} {gib(gpu.memory):6.0f} {fits:>5} {time.seconds:8.2f} {rate:8.3f} {time.utilisation:5.0%}"
            f"   {detail}"
        )
    if any(plan.lacks(gpu) == "host" for gpu in _gpus(plan)):
        yield "fits 'host': on the GPU, but not in the host's memory"
    yield ""
    yield from (f"assumed: {line}" for line in _assumptions(plan))


def _assumptions(plan: Plan) -> list[str]:
    """With the rates of the GPU asked about, where it is none of the known ones."""
    gpu = plan.machine.gpu
    if gpu is None or gpu in GPUS.values():
        return list(ASSUMPTIONS)
    rates = (
        f"{gpu.name}: {gpu.half / 1e12:.1f} TFLOP/s in 16 bits, {gpu.single / 1e12:.1f} in fp32, memory "
        f"{gpu.bandwidth / 1e9:.0f} GB/s, PCIe {gpu.link / 1e9:.0f} GB/s"
    )
    return [rates, *ASSUMPTIONS]


def _gpus(plan: Plan) -> list[Gpu]:
    asked = plan.machine.gpu
    return [*([asked] if asked and asked not in GPUS.values() else []), *GPUS.values()]


def _streamed(plan: Plan) -> dict[str, Any] | None:
    """Weights that come from the host for every pass; None where they stay."""
    job, gpu = plan.job, plan.machine.gpu
    if not streams(job):
        return None
    layer = streamed_layer(job, plan.numbers, gpu) if gpu else None
    kept = [asdict(way) for way in ways(job, plan.numbers, plan.run)]
    return {"layer": layer and asdict(layer) | {"meet": layer.meet}, "state": kept}


def as_json(plan: Plan, advice: Advice | None) -> dict[str, Any]:
    """The plan in bytes and seconds."""
    return {
        "job": asdict(plan.job) | {"config": asdict(plan.job.config)},
        "parameters": asdict(plan.numbers),
        "parts": [asdict(part) for part in plan.parts],
        "needed": {
            place: {"bytes": plan.need(place), "moment": needed(plan.parts, place)[1]} for place in (DEVICE, HOST, DISK)
        },
        "moments": list(MOMENTS),
        "streamed": _streamed(plan),
        "machine": asdict(plan.machine),
        "fits": not plan.short(),
        "context": plan.context,
        "time": {
            gpu.name: asdict(plan.time(gpu)) | {"seconds": plan.time(gpu).seconds, "lacks": plan.lacks(gpu)}
            for gpu in _gpus(plan)
        },
        "advice": None
        if advice is None
        else {
            "flags": advice.change,
            "needed": {place: advice.plan.need(place) for place in (DEVICE, HOST, DISK)},
        },
        "assumptions": _assumptions(plan),
    }
