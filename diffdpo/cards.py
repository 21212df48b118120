"""Cards (GPUs) by name, and what their makers say of them (dense, no sparsity)."""

from dataclasses import dataclass

T, G, GIB = 1e12, 1e9, 1 << 30


@dataclass(frozen=True)
class Gpu:
    """``memory`` bytes; rates in FLOP/s for 16-bit matrix products with fp32 sums and for fp32 (TF32 off, torch's
    default); ``bandwidth`` and ``link`` (host to device, one way) in bytes/s."""

    name: str
    memory: int
    half: float
    single: float
    bandwidth: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 4080", 16 * GIB, 97.5 * T, 48.7 * T, 717 * G, 32 * G),
        Gpu("RTX 4090", 24 * GIB, 165.2 * T, 82.6 * T, 1008 * G, 32 * G),
        Gpu("A100", 80 * GIB, 312 * T, 19.5 * T, 2039 * G, 32 * G),
        Gpu("H100", 80 * GIB, 989 * T, 67 * T, 3350 * G, 64 * G),
        Gpu("H200", 141 * 10**9, 989 * T, 67 * T, 4800 * G, 64 * G),
    )
}
SLOWER = ("pcie", "nvl", "super", "laptop", "rtx4090d")
"""In the names of cards that bear a known one's name and have other rates."""


def plain(name: str) -> str:
    """A GPU's name as it is compared."""
    return name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia").removeprefix("geforce")


def peak_of(device_name: str, *, bf16: bool) -> float | None:
    """FLOP/s of the card that a driver calls so; None where it is not known."""
    name = plain(device_name)
    known = [gpu for key, gpu in GPUS.items() if name.startswith(plain(key))]
    if not known or ("a100" not in name and any(word in name for word in SLOWER)):
        return None
    return known[0].half if bf16 else known[0].single
