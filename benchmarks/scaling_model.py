"""How a step would scale to 8, 64 and 512 GPUs: bytes by the engines' rules, as measured; rates from data sheets.

Everything assumed is printed with the forecast. It is arithmetic, not a measurement: no GPU has run it.
"""

from dataclasses import dataclass

from diffdpo.cards import GPUS
from diffdpo.planner.hardware import MATMUL_SHARE

ENGINES = ("plain", "fsdp2", "zero2", "zero3")
LINK_SHARE = 0.7  # of a link's rate that collectives of large messages reach
LATENCY = 20e-6  # seconds of a collective and hop of its ring
A_HOST = 8


@dataclass(frozen=True)
class Link:
    """Bytes/s of each GPU, one way."""

    name: str
    inside: float
    between: float


LINKS = (
    Link("NVLink 450 GB/s inside, 400 Gb/s a GPU between hosts", 450e9, 50e9),
    Link("NVLink 450 GB/s inside, 100 Gb/s a host between hosts", 450e9, 12.5e9 / A_HOST),
)


@dataclass(frozen=True)
class Job:
    """LLaDA-8B, all weights, bf16, one pair a micro-batch: 2 answers of 1024 tokens, n = 4, with the reference."""

    weights: float = 8.0e9
    layers: int = 32
    tokens: int = 2 * 4 * 1024
    global_pairs: int = 512

    @property
    def flops(self) -> float:
        """Of a micro-batch: forward, backward, the reference's forward."""
        return (2 + 4 + 2) * self.weights * self.tokens


def theory(
    engine: str,
    weights: float,
    processes: int,
    backwards: int,
    *,
    width: int = 4,
    gradient: int = 4,
    tied: float = 0.0,
) -> float:
    """Bytes that a process sends in a step, by a ring. ``width``: bytes of a weight that is gathered, ``gradient``: of
    one that is summed; ``tied``: weights of an embedding that is the head as well.

    plain: one sum of all gradients a step. ZeRO-2: gradients at each backward (as sums where a backend cannot scatter:
    gloo), updated weights once. FSDP2: gathered for each forward and each backward, gradients scattered at each
    backward; an embedding that is the head is called twice, so gathered twice as often. ZeRO-3 under ``two_pass``
    gathers for one forward more, the one without a graph; each of its segments is a backward.
    """
    share = (processes - 1) / processes
    whole, summed = weights * width * share, weights * gradient * share
    return {
        "plain": 2 * summed,
        "zero2": 2 * summed * backwards + whole,
        "fsdp2": (2 * (whole + tied * width * share) + summed) * backwards,
        "zero3": (3 * (whole + tied * width * share) + summed) * backwards,
    }[engine]


def step_seconds(job: Job, gpus: int, link: Link, *, factor: float, hybrid: bool) -> tuple[float, float]:
    """(all of communication hidden behind compute, none of it) of FSDP2. ``hybrid``: weights travel inside hosts,
    gradients once a step between them."""
    micro = max(1, job.global_pairs // gpus)
    compute = micro * job.flops / (MATMUL_SHARE * GPUS["H100"].half)
    inside = gpus <= A_HOST
    ring = A_HOST if hybrid else gpus
    # a ring leaves a host once: what it carries goes over the links of all GPUs of the host together
    rate = link.inside if inside or hybrid else min(link.inside, A_HOST * link.between)
    sent = factor * theory("fsdp2", job.weights, ring, micro, width=2)
    talk = sent / (LINK_SHARE * rate) + 3 * job.layers * micro * LATENCY * (ring - 1) ** 0.5
    if hybrid and not inside:
        hosts = gpus // A_HOST
        talk += micro * 2 * (hosts - 1) / hosts * job.weights * 4 / A_HOST / (LINK_SHARE * link.between)
    return max(compute, talk), compute + talk


def forecast(rows: list[dict]) -> str:
    """Markdown: assumptions, then a line for each number of GPUs and link."""
    job = Job()
    ratios = [r["bytes"] / r["theory"] for r in rows if r["engine"] == "fsdp2" and r["processes"] > 1]
    factor = max(ratios, default=1.0)
    uneven = {r["run"]: r for r in rows if r["engine"] == "fsdp2"}
    lost = "not measured"
    if "uneven" in uneven:
        share = max(uneven["uneven"]["waiting"]) / uneven["uneven"]["seconds"]
        lost = f"measured with a quarter of the tokens on one of two ranks: it waits {share:.0%} of the step"
    lines = [
        f"Assumed: {Job.__doc__} A step of {job.global_pairs} pairs however many GPUs (strong scaling). H100, "
        f"{GPUS['H100'].half / 1e12:.0f} TFLOP/s of which {MATMUL_SHARE:.0%} are reached; links at {LINK_SHARE:.0%} of "
        f"their rate; {LATENCY * 1e6:.0f} us a collective times the root of the ring; FSDP2, bf16 gathered, fp32 "
        f"summed, bytes {factor:.2f} times theory as measured; no waiting for uneven ranks "
        f"({lost}).",
        "",
        "| GPUs | links | cut over | s a step, all hidden | none hidden | pairs/s | share of 8 GPUs' rate a GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for link in LINKS:
        base = job.global_pairs / step_seconds(job, A_HOST, link, factor=factor, hybrid=False)[1] / A_HOST
        for gpus in (8, 64, 512):
            for hybrid in (False, True)[: 1 + (gpus > A_HOST)]:
                best, worst = step_seconds(job, gpus, link, factor=factor, hybrid=hybrid)
                rates = [job.global_pairs / seconds for seconds in (worst, best)]
                over = "each host" if hybrid else "all"
                lines.append(
                    f"| {gpus} | {link.name} | {over} | {best:.1f} | {worst:.1f} | {rates[0]:.0f} to {rates[1]:.0f} "
                    f"| {rates[0] / gpus / base:.0%} |"
                )
    return "\n".join(lines)
