"""Packages that are installed and cannot be imported are told, whatever their import does to Python."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from diffdpo.cli import doctor
from diffdpo.doctor import examine, gpus, software
from diffdpo.doctor.finding import ERROR, WARNING, error
from diffdpo.doctor.imports import Imports
from diffdpo.errors import UserError
from tests.support.paths import ROOT

BROKEN = {
    "raises": (
        "raise OSError('first line\\nlibcudart.so.13: cannot open\\n')",
        "OSError: libcudart.so.13: cannot open",
    ),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends Python by SIGSEGV"),
    "exits": ("import os; os._exit(7)", "ends Python with exit code 7"),
    "hangs": ("import time; time.sleep(60)", "no end within 1 s"),
    "talks": ("print('hello'); import os; os.write(1, b'hello')", ""),
    "half-there": ("raise ImportError('the name is half_there')", "ImportError: the name is half_there"),
    "good": ("", ""),
}


def test_every_way_to_fail_is_an_answer_and_the_rest_goes_on(tmp_path, monkeypatch):
    for name, (text, _) in BROKEN.items():
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    imports = Imports(list(BROKEN), seconds=1)
    assert {name: imports.fault(name) for name in BROKEN} == {name: said for name, (_, said) in BROKEN.items()}
    assert imports.fault("never asked for") == ""


def test_the_child_imports_from_where_the_doctor_would(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("raise ImportError('of the folder it was started in')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert Imports(["pyyaml"]).fault("pyyaml") == ""


def known(**faults):
    return SimpleNamespace(fault=lambda name: faults.get(name.replace("-", "_"), ""))


@pytest.mark.parametrize(
    ("faults", "name", "state", "said"),
    [
        ({"peft": "E: x", "transformers": "E: x"}, "transformers", ERROR, "(E: x), nor can peft"),
        ({"torch": "E: libcudart"}, "torch", ERROR, "E: libcudart"),
        ({"deepspeed": "E: x"}, "deepspeed", WARNING, "no run with --ds_config"),
        ({"bitsandbytes": "E: x"}, "bitsandbytes", WARNING, "no --load_in_4bit"),
        ({"deepspeed": "E: x", "psutil": "E: x"}, "psutil", ERROR, "nor can deepspeed"),
    ],
)
def test_a_fault_is_told_once_by_the_name_of_who_has_it(faults, name, state, said):
    (found,) = software.unimportable(known(**faults))
    assert (found.name, found.state) == (name, state) and said in found.found
    assert f"--force-reinstall {name}" in found.advice


def test_what_cannot_be_imported_is_not_as_it_should_be():
    def count(imports):
        return int(next(f for f in software.packages(imports) if f.name == "packages").found.split()[0])

    assert count(known(peft="E: x")) == count(known()) - 1
    assert "bitsandbytes" not in [found.name for found in software.optional(known(bitsandbytes="E: x"), gpu=False)]
    assert list(software.torch(known(torch="E: x"))) == []


def test_operators_of_a_deepspeed_that_cannot_be_imported_are_no_second_fault():
    assert list(examine._operators(known(deepspeed="E: x"), gpu=False)) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "nonsense"], "'nonsense' is unknown"),
        (["--device", "cpu"], "add --self_test"),
        (["--device", "nonsense", "--self_test", "--json"], "'nonsense' is unknown"),
        (["--device", "cuda", "--self_test", "--json"], "no GPU"),
    ],
)
def test_a_device_is_judged_before_anything_is_looked_at(monkeypatch, flags, said):
    monkeypatch.setattr(examine, "examine", lambda *_, **__: pytest.fail("looked first"))
    monkeypatch.setattr(software, "begin_imports", known)
    monkeypatch.setattr(gpus, "visible", lambda: 0)
    with pytest.raises(UserError, match=said):
        doctor.main(flags)


def test_a_number_of_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(gpus, "visible", lambda: 2)
    doctor._check_there("cuda:1", known())
    with pytest.raises(UserError, match="the last is cuda:1"):
        doctor._check_there("cuda:2", known())
    doctor._check_there("cuda:2", known(torch="E: x"))  # what torch lacks is told by the looks


def test_a_self_test_that_cannot_be_imported_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffdpo.doctor.self_test", None)
    compared, (found,) = doctor._self_test("cpu", [], print)
    assert compared is None and found.state == ERROR and "cannot be imported" in found.found
    _, (found,) = doctor._self_test("cpu", [error("transformers", "", ""), error("outputs", "", "")], print)
    assert found.found == "not without transformers"


@pytest.mark.slow
def test_the_command_with_a_package_that_cannot_be_imported(command, python, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('shadowed')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = command([python, "launch/doctor.py", "--self_test", "--json"], timeout=120, PYTHONPATH=path)
    everything = json.loads(done.stdout)
    assert done.returncode == 1 and not everything["passed"] and everything["self_test"] is None
    found = {finding["name"]: finding for findings in everything["findings"].values() for finding in findings}
    assert "cannot be imported (ImportError: shadowed)" in found["transformers"]["found"]
    assert str(tmp_path) in found["transformers"]["advice"] and "transformers" in found["self-test"]["found"]
    assert not [each["found"] for each in found.values() if "could not be looked at" in each["found"]]
