"""A SLURM for tests: ``sbatch`` that starts a job script here, and stubs of ``srun`` and ``scontrol``.

``srun`` writes down its words and environment. With ``SRUN=run`` it starts the tasks, hands SIGTERM on to them and ends
with the largest of their codes, as SLURM's does; otherwise it ends with ``SRUN_CODE``.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DIRECTIVES = {
    *("job-name", "output", "open-mode", "requeue", "signal", "nodes", "ntasks-per-node", "gpus-per-node"),
    *("cpus-per-task", "mem", "time", "exclusive", "array"),
}
LAUNCHING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

SRUN = """#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
options = [words.pop(0) for _ in range(next((n for n, w in enumerate(words) if not w.startswith("-")), 0))]
given = dict(o.lstrip("-").partition("=")[::2] for o in options)
call = {{"program": "srun", "options": options, "words": words, "environment": dict(os.environ)}}
with open(os.environ["SLURM_LOG"], "a") as log:
    print(json.dumps(call), file=log)
if os.environ.get("SRUN") != "run":
    sys.exit(int(os.environ.get("SRUN_CODE", 0)))
tasks = int(given.get("ntasks", os.environ["SLURM_NTASKS"]))
a_node = tasks // int(os.environ["SLURM_NNODES"])
running = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in running])
for n in range(tasks):
    own = {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % a_node), "SLURM_NODEID": str(n // a_node)}}
    running.append(subprocess.Popen(words, env=os.environ | own | {{"SLURM_NTASKS": str(tasks)}}))
codes = [task.wait() for task in running]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""

SCONTROL = """#!{python}
import json, os, sys
with open(os.environ["SLURM_LOG"], "a") as log:
    print(json.dumps({{"program": "scontrol", "words": sys.argv[1:]}}), file=log)
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace(",", "\\n"))
if sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={{os.environ['SLURM_JOB_ID']}} JobState={{os.environ.get('JOB_STATE', 'RUNNING')}} Requeue=1")
"""


def install(folder: Path) -> Path:
    """The stubs' folder, for PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines. ValueError for one that sbatch would pass over because a command stands before it."""
    found: dict[str, str] = {}
    begun = False
    for line in script.read_text().splitlines():
        if match := re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line):
            if begun or match[1] not in DIRECTIVES:
                raise ValueError(f"{script}: {line}")
            found[match[1]] = match[2] or ""
        elif line.strip() and not line.startswith("#"):
            begun = True
    return found


@dataclass(frozen=True)
class Job:
    """What a job script did: its exit code, what it said, and its calls of the stubs."""

    code: int
    said: str
    calls: list[dict]

    @property
    def steps(self) -> list[dict]:
        return [call for call in self.calls if call["program"] == "srun"]

    @property
    def requeued(self) -> list[str]:
        return [call["words"][1] for call in self.calls if call.get("words", [""])[0] == "requeue"]


def start(
    folder: Path, script: str, *words: str, hosts: str = "localhost", environment: dict[str, str], **options: str
):
    """``sbatch --OPTION=... SCRIPT WORD...``: the process and a function that waits for it and gives the ``Job``."""
    given = directives(ROOT / script) | {name.replace("_", "-"): value for name, value in options.items()}
    nodes = int(given["nodes"])
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": hosts,
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * int(given["ntasks-per-node"])),
        "SLURM_CPUS_PER_TASK": given["cpus-per-task"],
        "SLURM_LOG": str(folder / "log"),
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHING}
    process = subprocess.Popen(
        ["bash", str(spooled(folder, script)), *words],
        env=clean | slurm | environment,
        cwd="/",  # a job starts from where it was submitted; these scripts do not rely on it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def finished(timeout: float = 60) -> Job:
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            pytest.fail(f"{script} ran longer than {timeout} s\n{said[-3000:]}")
        return Job(process.returncode, said, [json.loads(line) for line in (folder / "log").read_text().splitlines()])

    return process, finished


def spooled(folder: Path, script: str) -> Path:
    """The copy that SLURM runs, beside which nothing else of the project lies."""
    copy = folder / "slurm_script"
    copy.write_text((ROOT / script).read_text())
    return copy
