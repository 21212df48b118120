"""A package that cannot be imported is told with its reason, and is as if it were not installed from then on."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.optimizer_kinds import make_optimizer
from diffdpo.errors import UserError
from diffdpo.models.checkpoint.nf4 import expect_nf4
from diffdpo.optional import fault_of, in_a_line

BROKEN = "raise ImportError('libcudart.so.12: cannot open shared object file')\n"
SAID = "bitsandbytes cannot be imported: ImportError: libcudart.so.12: cannot open shared object file; pip install"


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """``broken(package)``: one that is found and raises when it is imported."""

    def write(package: str) -> None:
        (tmp_path / f"{package}.py").write_text(BROKEN)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # what is there now is put back afterwards
        del sys.modules[package]

    fault_of.cache_clear()
    yield write
    fault_of.cache_clear()


def test_what_is_there_what_is_not_and_what_is_broken(broken):
    broken("a_broken_package")
    assert fault_of("json") is None
    assert fault_of("no_such_package") == "no_such_package is not installed"
    fault = "a_broken_package cannot be imported: ImportError: libcudart.so.12: cannot open shared object file"
    assert fault_of("a_broken_package") == fault
    assert importlib.util.find_spec("a_broken_package") is None and fault_of("a_broken_package") == fault


def test_what_needs_it_says_why_it_cannot_be_had(broken):
    broken("bitsandbytes")
    with pytest.raises(UserError, match=SAID):
        expect_nf4(nn.Linear(2, 2), torch.float32)
    with pytest.raises(UserError, match=SAID):
        make_optimizer(nn.Linear(2, 2), OptimizerOptions(1e-3, name="adamw_8bit"), torch.device("cpu"))


def test_an_exception_of_many_lines_or_none_is_one():
    assert in_a_line(ValueError("\nfirst\nsecond")) == "ValueError: first" and in_a_line(KeyError()) == "KeyError"
