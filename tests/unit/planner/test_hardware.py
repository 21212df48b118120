"""GPUs by name or memory, and sizes as they are written."""

import pytest

from diffdpo.errors import UserError
from diffdpo.planner.hardware import find_gpu
from diffdpo.planner.sizes import GIB, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 * GIB), ("16G", 16 * GIB), ("24.5 GB", 24_500_000_000), ("64gib", 64 * GIB), ("1TB", 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "GiB", "16", "-1GiB", "16 apples", "1e3GiB"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(UserError, match="--gpu_memory"):
        parse_size(text, "gpu_memory")


@pytest.mark.parametrize("name", ["RTX 4080", "rtx4080", "4080", "NVIDIA GeForce RTX 4080"])
def test_a_gpu_by_its_names(name):
    assert find_gpu(name, None).memory == 16 * GIB


def test_memory_alone_and_with_a_name():
    assert find_gpu(None, 16 * GIB).half == find_gpu("4080", None).half
    assert find_gpu("A100", 40 * GIB).memory == 40 * GIB
    assert find_gpu(None, None) is None


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match="RTX 9999"):
        find_gpu("RTX 9999", None)


def test_a_gpu_of_any_given_numbers():
    rates = {"half": 200e12, "single": 50e12, "bandwidth": 900e9, "link": 16e9}
    gpu = find_gpu(None, 20 * GIB, rates)
    assert (gpu.memory, gpu.half, gpu.single, gpu.bandwidth, gpu.link) == (20 * GIB, *rates.values())
    assert find_gpu("4080", None, {"link": 16e9}).half == find_gpu("4080", None).half
    with pytest.raises(UserError, match="give --gpu_memory or --gpu"):
        find_gpu(None, None, rates)


def test_rates():
    assert parse_rate("97.5T", "x") == 97.5e12 and parse_rate("717 g", "x") == 717e9
    for text in ("", "12", "0T", "1TB", "-1G"):
        with pytest.raises(UserError, match="--gpu_flops"):
            parse_rate(text, "gpu_flops")
