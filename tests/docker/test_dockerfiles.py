"""The images' files: linted, consistent with the project's own, and (slow) carried out."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docker.image import build, exec_form, read_dockerfile, sent
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
FILES = [DOCKER / name for name in ("Dockerfile", "Dockerfile.cpu", "Dockerfile.mlflow")]
OURS = FILES[:2]  # those that hold the project
HADOLINT = str(Path(sys.executable).with_name("hadolint"))
NAMES = [path.name for path in FILES]
SHORT = ["--max_steps", "2", "--num_generated_pairs", "64", "--max_eval_pairs", "16", "--num_eval_problems", "2"]


def values(path: Path, name: str) -> list[str]:
    return [instruction.value for instruction in read_dockerfile(path) if instruction.name == name]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_hadolint_finds_nothing(command, path):
    done = command([HADOLINT, "--config", str(DOCKER / ".hadolint.yaml"), str(path)], timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find_something(command, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN sudo ls\nRUN apt-get install -y g++\nCMD python\n")
    done = command([HADOLINT, "--config", str(DOCKER / ".hadolint.yaml"), str(tmp_path / "Dockerfile")], timeout=60)
    assert done.returncode and all(rule in done.stdout for rule in ("DL3007", "DL3004", "DL3015", "DL3025"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_root_and_a_look_at_its_health(path):
    names = [instruction.name for instruction in read_dockerfile(path)]
    assert values(path, "USER")[-1].isdigit() and int(values(path, "USER")[-1]) > 0
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))
    assert exec_form(values(path, "HEALTHCHECK")[0]) and exec_form(values(path, "CMD")[0])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_pip_line_is_pinned(path):
    lines = [part for value in values(path, "RUN") for part in value.split("&&") if "pip install" in part]
    assert lines and all("-c constraints.txt" in line and "--no-cache-dir" in line for line in lines)
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    named = {word.lower() for line in lines for word in line.split() if re.fullmatch(r"[A-Za-z][\w-]+[\w]", word)}
    loose = {"pip", "install", "deepspeed", "wheel", "py-cpuinfo", "pydantic"}  # what DeepSpeed's build reads
    assert named - loose <= pinned


@pytest.mark.parametrize("path", OURS, ids=NAMES[:2])
def test_both_images_of_the_project_start_alike(path):
    assert exec_form(values(path, "HEALTHCHECK")[0]) == ["python", "launch/doctor.py"]
    commands = [exec_form(values(one, "CMD")[0]) for one in (path, OURS[0])]
    trains = [command[command.index("launch/train.py") :] for command in commands]
    assert trains[0] == trains[1] and values(path, "USER") == values(OURS[0], "USER")
    assert "deepspeed" not in commands[0]  # it would not hand on the SIGTERM of `docker stop`
    bases = [value.split()[0].split("-")[0] for value in values(path, "FROM")]
    assert len(set(bases)) == 1  # what is compiled in one CUDA runs in it


def test_the_server_s_image_has_the_extra_server():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    line = next(value for value in values(FILES[2], "RUN") if "pip install" in value)
    assert set(extras["server"]) | {"mlflow"} <= set(line.split())


def test_what_is_sent_to_a_build():
    names = sent(ROOT)
    for name in ("pyproject.toml", "launch/train.py", "ds_configs/zero2.json", "docker/basic_auth.ini"):
        assert name in names
    assert any(name.startswith("diffdpo/pretrained/") for name in names)
    assert not [name for name in names if name.startswith((".", "tests/", "docs/")) or ".env" in name]


def why_not_built() -> str | None:
    """Why no image can be carried out here; None if one can."""
    if os.geteuid():
        return "needs root, for chroot and mounts"
    if not shutil.which("debootstrap"):
        return "debootstrap is not installed"
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return None if subprocess.run(mount, capture_output=True).returncode == 0 else "nothing can be mounted here"


@pytest.fixture(scope="module")
def cpu_image(tmp_path_factory):
    """docker/Dockerfile.cpu, every line of it. Ten to twenty minutes."""
    if reason := why_not_built():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("cpu_image")
    yield build(DOCKER / "Dockerfile.cpu", root, ROOT)
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_cpu_image_trains_as_its_own_user_without_compiling(cpu_image):
    done = cpu_image.run([*cpu_image.command, *SHORT], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "compiling" not in done.stdout
    summary = cpu_image.root / "outputs/run/summary.json"
    assert summary.is_file() and summary.stat().st_uid == int(cpu_image.user) != 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_cpu_image_is_healthy(cpu_image):
    if not (ROOT / cpu_image.health[1]).exists():
        pytest.skip(f"{cpu_image.health[1]} is not there")
    done = cpu_image.run(cpu_image.health, timeout=120)  # the HEALTHCHECK's --timeout
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
