"""What the doctor says of machines as they are and as they should not be."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest

from diffdpo.doctor import compilers, folders, host, network, software
from diffdpo.doctor.finding import ERROR, OK, WARNING, error, looked, ok, warning, worst
from diffdpo.doctor.imports import Imports
from diffdpo.doctor.report import WIDTH, as_json, as_text


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_look_that_fails_or_hangs_is_a_line():
    def breaks():
        yield ok("first", "there")
        raise OSError("no such device")

    found = looked("thing", breaks)
    assert [finding.state for finding in found] == [OK, WARNING] and "no such device" in found[1].found
    (late,) = looked("thing", lambda: time.sleep(5), patience=0.05)
    assert late.state == WARNING and "0.05" in late.found


def test_a_look_that_lacks_a_package_blames_the_package():
    def lacks():
        raise ModuleNotFoundError("No module named 'psutil'")

    (found,) = looked("thing", lacks)
    assert "psutil" in found.found and "package" in found.advice and "bug" not in found.advice


def test_the_gravest_state_counts():
    assert worst([ok("a", ""), error("b", "", ""), warning("c", "", "")]) == ERROR and worst([]) == OK


def test_every_package_of_pyproject_is_looked_at(monkeypatch):
    asked = dict(software.requirements())
    assert {"torch", "deepspeed", "safetensors"} <= asked.keys() and asked["torch"].startswith(">=")
    there = dict.fromkeys(asked, "9999") | {"peft": None, "deepspeed": None, "torch": "2.1.0"}
    monkeypatch.setattr(software, "installed", there.get)
    found = by_name(software.packages(Imports([])))
    assert found["peft"].state == ERROR and "pip install" in found["peft"].advice
    assert found["deepspeed"].state == WARNING and "--engine" in found["deepspeed"].advice
    assert found["torch"].state == WARNING and "2.1.0" in found["torch"].found
    assert found["packages"].found.startswith(str(len(asked) - 3))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert by_name(compilers.compilers(gpu=False))["C++ compiler"].state == WARNING


def test_operators_that_cannot_be_had_say_for_what_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = by_name(compilers.operators(gpu=False))
    assert "g++" in found["operators"].advice and "cpu_adam (optimizer on the host)" in found["operators"].found
    assert "pin_memory (NVMe offload)" in found["operators"].found, "a run that offloads to NVMe compiles it too"
    assert found["operators there"].found == "none" and "to be compiled" not in found


def test_a_container_s_limits_count(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    for name, text in (("memory.max", 2 * 2**30), ("memory.current", 2**30), ("cpu.max", "50000 100000")):
        (tmp_path / name).write_text(str(text))
    (memory,) = host.memory()
    assert memory.state == WARNING and memory.found.startswith("1.0 of 2.0 GiB")
    assert "0.5 of them" in next(host.processors()).found
    (tmp_path / "memory.max").write_text("max")
    assert "container" not in next(host.memory()).found


@pytest.mark.parametrize(("threads", "state"), [("1", WARNING), ("many", WARNING), ("2", OK)])
def test_threads(monkeypatch, threads, state):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert next(host.processors()).state == state


def test_folders(tmp_path, monkeypatch):
    (good,) = folders.outputs(tmp_path / "not" / "yet")
    assert good.state in (OK, WARNING) and str(tmp_path / "not" / "yet") in good.found
    assert not (tmp_path / "not").exists() and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (bad,) = folders.outputs(tmp_path / "file" / "below")
    assert bad.state == ERROR and "is a file" in bad.found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    assert next(folders.outputs(None)).state == WARNING, "nobody named it: --output_dir is the way out"


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.tempfile, "TemporaryFile", full)
    (found,) = folders.outputs(tmp_path)
    assert found.state == ERROR and "No space left" in found.found and "--output_dir" in found.advice


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib77")
    found = by_name(network.interfaces())
    assert "ib77" in found["NCCL_SOCKET_IFNAME"].found
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert "NCCL_SOCKET_IFNAME" not in by_name(network.interfaces())


def test_the_screen_and_the_json():
    findings = [ok("a", "word " * 60), warning("b", "found", "do this")]
    text = as_text("subject", findings)
    assert max(map(len, text.splitlines())) <= WIDTH and text.splitlines()[-1].strip() == "→ do this"
    everything = json.loads(json.dumps(as_json({"subject": findings}, None, True)))
    assert everything["passed"] and everything["self_test"] is None
    assert everything["findings"]["subject"][1]["advice"] == "do this"


GPU_SMI = "#!/bin/sh\necho 'NVIDIA GeForce RTX 4080, 580.65.06'\n"


@pytest.mark.parametrize(
    ("asked", "built", "said"), [("banana", "13.0", "'banana'"), (None, None, "built for the CPU")]
)
def test_a_gpu_that_torch_does_not_see_is_explained(tmp_path, monkeypatch, asked, built, said):
    from diffdpo.doctor import gpus

    (tmp_path / "nvidia-smi").write_text(GPU_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked) if asked else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    driver, gpu = gpus.driver()
    assert "580.65.06, 1 GPU" in driver.found and gpu.state == WARNING
    assert said in gpu.found and gpu.advice


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "version mismatch (exit code 18)",
        ),
        ("echo 'no permission' >&2; exit 4", "no permission (exit code 4)"),
        ("exit 0", "nothing (exit code 0)"),
        ("sleep 20", "no answer within 0.2 s"),
    ],
)
def test_a_driver_that_fails_is_not_a_machine_without_one(tmp_path, monkeypatch, script, said, count):
    from diffdpo.doctor import gpus

    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "SMI_SECONDS", 0.2 if "sleep" in script else 8)
    monkeypatch.setattr(gpus, "visible", lambda: count)
    start = time.perf_counter()
    (found,) = gpus.driver()
    assert found.state == WARNING and said in found.found and "reboot" in found.advice
    assert ("sees no GPU" if count == 0 else "sees 1 GPU") in found.found
    assert time.perf_counter() - start < 10, "what nvidia-smi has started is not waited for"


@pytest.mark.parametrize(("asked", "state"), [("0", OK), (None, WARNING)])
def test_fewer_gpus_than_the_driver_has(monkeypatch, asked, state):
    from diffdpo.doctor import gpus

    monkeypatch.setattr(gpus, "_by_driver", lambda: (["H200", "H200"], "580.65.06", ""))
    monkeypatch.setattr(gpus, "visible", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked) if asked else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    _, seen = gpus.driver()
    assert seen.state == state and seen.found.startswith("1 of 2") and "None" not in seen.found


@pytest.mark.parametrize(
    ("triton", "capability", "name", "state"),
    [
        (True, (8, 9), "FlexAttention", OK),
        (True, (6, 1), "triton", WARNING),
        (False, (8, 9), "triton", WARNING),
    ],
)
def test_flex_attention_needs_triton_on_a_gpu_that_it_knows(card, monkeypatch, triton, capability, name, state):
    import importlib.util

    from diffdpo.doctor import gpus

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: triton or None if one == "triton" else real(one))
    card["capability"] = capability
    found = by_name(gpus.kernels())
    assert found[name].state == state and "--attn_implementation flex_attention" in found[name].found
    assert ("FlexAttention" in found) == (name == "FlexAttention")


def test_the_command_without_torch_or_anything_else(command, tmp_path):
    """-S -I: no packages at all, as on a machine where nothing was installed."""
    root = str(software.Path(software.__file__).parents[2])
    imports = "from diffdpo.command import run; from diffdpo.cli.doctor import main"
    code = f"import sys; sys.path.insert(0, {root!r}); {imports}; run(main)"
    done = command([sys.executable, "-S", "-I", "-c", code, "--self_test", "--json"], timeout=120, cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    everything = json.loads(done.stdout)
    assert everything["self_test"] is None and "torch" in everything["findings"]["self-test"][0]["found"]
    states = {f["name"]: f["state"] for findings in everything["findings"].values() for f in findings}
    assert states["torch"] == ERROR and states["deepspeed"] == WARNING and states["Python"] == OK


@pytest.fixture
def card(monkeypatch):
    """torch.cuda as on a machine with one GPU, of which a test changes what it likes."""
    from diffdpo.doctor import gpus

    said = {"free": 15 * 2**30, "capability": (8, 9), "bf16": True, "rates": [12.0, 12.5]}
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4080", major=8, minor=9)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (said["free"], 16 * 2**30),
        "is_bf16_supported": lambda: said["bf16"],
        "get_device_capability": lambda: said["capability"],
        "nccl.version": lambda: (2, 28, 9),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    monkeypatch.setattr(gpus, "copy_rates", lambda index: said["rates"])
    return said


def test_a_gpu_and_what_runs_on_it(card):
    from diffdpo.doctor import gpus

    found = [*gpus.each(), *gpus.kernels()]
    assert "15.0 of 16.0 GiB free, sm_89" in found[0].found and "12.0 GB/s" in found[1].found
    assert "varlen" in by_name(found)["attention"].found and by_name(found)["NCCL"].found == "2.28.9"
    assert [one for one in found if one.name != "triton" and one.state != OK] == []


def test_what_a_gpu_may_lack(card):
    from diffdpo.doctor import gpus

    card |= {"free": 3 * 2**30, "capability": (7, 5), "bf16": False, "rates": [3.1, 12.0]}
    found = [*gpus.each(), *gpus.kernels()]
    assert [one.state for one in found[:3]] == [WARNING] * 3
    assert "others hold memory" in found[0].advice and "bf16" in found[1].found and "PCIe" in found[2].advice
    assert by_name(found)["attention"].state == WARNING


def test_whose_malloc_it_is(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    monkeypatch.setattr(host, "Path", lambda name: maps if name == "/proc/self/maps" else None)
    monkeypatch.setattr(host.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for mapped, said in (
        ("libc.so.6", "glibc's; with libjemalloc2"),
        ("libc.so.6\n/usr/lib/libjemalloc.so.2", "jemalloc"),
    ):
        maps.write_text(mapped)
        (finding,) = host.allocator()
        assert finding.state == OK and finding.found.startswith(said)


def test_a_folder_for_nvme_is_judged_as_a_run_would(tmp_path):
    (tmp_path / "file").touch()
    for folder, said in (
        (tmp_path / "nowhere", "nowhere is not there"),
        (tmp_path / "file", "file, which is not a folder"),
        (host.Path("/dev/shm"), "lies in memory"),
    ):
        (finding,) = folders.nvme(folder)
        assert finding.state == ERROR and said in finding.found


def test_without_a_folder_for_nvme_nothing_is_needed_to_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffdpo.engine.preflight", None)  # as where one of its packages is broken
    assert list(folders.nvme(None)) == []


@pytest.mark.parametrize("there", [True, False])
def test_temporary_files_are_measured_where_they_go(tmp_path, monkeypatch, there):
    asked = tmp_path / "asked"
    if there:
        asked.mkdir()
    monkeypatch.setenv("TMPDIR", str(asked))
    found = by_name(folders.caches())
    assert found["temporary files"].found.startswith(f"{asked if there else '/tmp'}: ")
    assert ("TMPDIR" in found) is not there
    assert there or (found["TMPDIR"].state == WARNING and str(asked) in found["TMPDIR"].found)
