"""GPUs by name or memory, and sizes as they are written."""

import pytest

from diffdpo.errors import UserError
from diffdpo.plan.hardware import find_gpu
from diffdpo.plan.sizes import GIB, parse_size


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
