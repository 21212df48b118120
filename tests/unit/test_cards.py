"""Cards by the names that drivers give them."""

import pytest

from diffdpo.cards import GPUS, peak_of


@pytest.mark.parametrize(
    ("driver", "known"),
    [
        ("NVIDIA GeForce RTX 4080", "RTX 4080"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4080 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_peak(driver, known):
    gpu = GPUS[known] if known else None
    assert peak_of(driver, bf16=True) == (gpu and gpu.half)
    assert peak_of(driver, bf16=False) == (gpu and gpu.single)
