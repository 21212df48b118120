"""Operators that are missing, and locks left behind."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from diffdpo.engine import operators
from diffdpo.engine.choice import DEEPSPEED, EngineChoice
from diffdpo.engine.ds_config import read_ds_config
from diffdpo.engine.make import check_host
from diffdpo.engine.operator_cache import operator_folder
from diffdpo.engine.operators import missing_operators, needed_operators, prepare_operators
from diffdpo.engine.world import World
from diffdpo.errors import UserError

WORLD = World(0, 0, 1, torch.device("cpu"))
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def cpu_adam(tmp_path, monkeypatch):
    """The folder of the compiled Adam, as torch leaves it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "1")  # nothing is compiled beside the engine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cpu_adam", "deepspeed_shm_comm"):
        folder = operator_folder() / name
        folder.mkdir(parents=True)
        (folder / "build.ninja").write_text("cflags = -I/elsewhere/deepspeed/ops/csrc")
        (folder / f"{name}.so").touch()
    return operator_folder() / "cpu_adam"


def test_what_a_run_loads(cpu_adam):
    assert needed_operators(OFFLOAD) == ["deepspeed_shm_comm", "cpu_adam"]
    assert needed_operators({}) == ["deepspeed_shm_comm", "fused_adam"]
    assert needed_operators({"optimizer": {"params": {"torch_adam": True}}}) == ["deepspeed_shm_comm"]


def test_nothing_is_said_when_all_is_there(cpu_adam, capsys):
    prepare_operators(OFFLOAD, WORLD, print)
    assert capsys.readouterr().out == ""


def test_a_compilation_is_announced(cpu_adam, capsys, monkeypatch):
    compiled: list[list[str]] = []
    monkeypatch.setattr(operators, "compile_together", compiled.append)
    monkeypatch.setattr(operators, "compilers", lambda: 7)
    (cpu_adam / "cpu_adam.so").unlink()
    prepare_operators(OFFLOAD, World(1, 1, 1, WORLD.device), print)
    assert compiled == [], "one process of a host does it"
    prepare_operators(OFFLOAD, WORLD, print)
    assert "compiling DeepSpeed's operators (cpu_adam): once on this machine, about 60 s" in capsys.readouterr().out
    assert compiled == [["cpu_adam"]] and os.environ["MAX_JOBS"] == "7", "for DeepSpeed's own compilations"


def test_a_lock_of_one_that_was_killed_as_it_compiled_is_removed(cpu_adam, capsys, monkeypatch):
    def killed(names):
        (cpu_adam / "lock").touch()
        os.utime(cpu_adam / "lock", (0, 0))

    monkeypatch.setattr(operators, "compile_together", killed)
    prepare_operators(OFFLOAD, WORLD, print)
    assert not (cpu_adam / "lock").exists(), "DeepSpeed would wait for it for ever"


def test_a_compilation_that_was_cut_short_is_taken_up_again(cpu_adam):
    os.utime(cpu_adam / "cpu_adam.so", (0, 0))  # older than the instructions to build it
    assert missing_operators(needed_operators(OFFLOAD)) == ["cpu_adam"]


def test_a_lock_that_was_left_behind_is_removed(cpu_adam, capsys):
    (cpu_adam / "lock").touch()
    os.utime(cpu_adam / "lock", (0, 0))
    prepare_operators(OFFLOAD, WORLD, print)
    assert f"removed {cpu_adam / 'lock'}" in capsys.readouterr().out and not (cpu_adam / "lock").exists()


@pytest.mark.parametrize("why", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_one_line_where_something_is_to_be_compiled(cpu_adam, monkeypatch, why):
    """Before a model is loaded, as with a compiler that is not there."""
    if why == "below a file":
        file = cpu_adam / "cpu_adam.so"
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(file / "below"))
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        assert missing_operators(needed_operators(OFFLOAD)) == [], "what is there is only read"
        (cpu_adam / "cpu_adam.so").unlink()
    with pytest.raises(UserError, match="set TORCH_EXTENSIONS_DIR to a folder that can be written"):
        check_host(EngineChoice(DEEPSPEED, ds_config={**OFFLOAD, "train_micro_batch_size_per_gpu": 1}))


def test_without_a_compiler_it_is_one_line(cpu_adam, monkeypatch):
    (cpu_adam / "cpu_adam.so").unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"install g\+\+"):
        missing_operators(needed_operators(OFFLOAD))


def test_what_deepspeed_was_installed_with_is_not_compiled(cpu_adam, monkeypatch):
    (cpu_adam / "cpu_adam.so").unlink()
    monkeypatch.setattr(operators, "_installed", lambda: ({"cpu_adam": True}, "cpu"))
    assert missing_operators(needed_operators(OFFLOAD)) == []
    monkeypatch.setattr(operators, "_installed", lambda: ({"cpu_adam": True}, "cuda"))  # made for another device
    assert missing_operators(needed_operators(OFFLOAD)) == ["cpu_adam"]


def test_what_deepspeed_wrote_of_its_installation_is_read():
    from deepspeed import git_version_info

    assert operators._installed() == (git_version_info.installed_ops, git_version_info.accelerator_name)


NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}


@pytest.mark.parametrize(
    ("release", "said"),
    [(None, "no CUDA toolkit"), ("", "no nvcc"), ("12.4", "CUDA 12.4 in .* built with 13.0"), ("13.1", None)],
)
def test_operators_of_a_gpu_need_the_toolkit_of_torch_s_major_version(tmp_path, monkeypatch, release, said):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None if release is None else str(tmp_path))
    if release:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V'\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        assert "async_io" in missing_operators(needed_operators(NVME))
    with nullcontext() if said is None else pytest.raises(UserError, match=f"{said}.*torch_adam"):
        assert missing_operators(["fused_adam"]) == ["fused_adam"]


def test_an_adapter_that_stays_on_the_card_compiles_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert needed_operators(read_ds_config(Path("4080_qlora"))) == []
