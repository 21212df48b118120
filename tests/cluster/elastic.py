"""Three hosts of an elastic torchrun, one of which dies: the others go on at once, with steps of the same records.

    python -m tests.cluster.elastic [--engine plain|fsdp2|zero2]      (as root, from the project's root)

Prints how long the attempt outlived the host, when the next step was taken, and whether the curve from there is that of
a run of two processes that begins at the same checkpoint.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.hosts import PORT, Host, curve, finish, first_difference, hosts, why_no_hosts

STEPS, DIES_AFTER, BATCH, PATIENCE = 14, 3, 6, 900
FLAGS = [
    *("--max_steps", str(STEPS), "--num_generated_pairs", "96", "--max_eval_pairs", "8", "--num_eval_problems", "0"),
    *("--per_device_train_batch_size", "2", "--global_batch_size", str(BATCH), "--tracking_uri", "none"),
    *("--save_steps", "1", "--save_total_limit", "99"),
]


@dataclass(frozen=True)
class Outcome:
    """``ended``: seconds from a host's death to the end of the others' processes; ``went_on``: to the next step's line;
    ``step``: of the checkpoint they went on from; ``before``: the world size's; ``lines``: the journal at the end."""

    ended: float
    went_on: float
    step: int
    lines: list[dict]


def elastic(members: Sequence[Host], out: Path, flags: Sequence[str], dies: int = 2) -> Outcome:
    """The run, the member ``dies`` of which is killed after some steps. RuntimeError where it does not go on."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{members[0].address}:{PORT}", "--rdzv_id", "elastic"]
    line = ["torchrun", "--nnodes", "1:3", "--nproc_per_node", "1", "--max-restarts", "3", *meeting]
    training = ["launch/train.py", *flags, "--output_dir", str(out), "--resume_from_checkpoint", "auto"]

    def start(host: Host):
        conf = f"is_host={host is members[0]},last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
        return host.start([*line, "--local_addr", host.address, "--rdzv_conf", conf, *training])

    agents = [start(host) for host in members]
    try:
        until(lambda: _steps(out) >= DIES_AFTER, "no step was taken", agents)
        others = [w for n, agent in enumerate(agents) if n != dies for w in workers(agent.pid)]
        for worker in workers(agents[dies].pid):
            worker.kill()
        os.killpg(agents[dies].pid, signal.SIGKILL)
        died, size = time.monotonic(), (out / "metrics.jsonl").stat().st_size
        until(lambda: not any(map(alive, others)), "the others did not end", agents)
        ended = time.monotonic() - died
        until(lambda: "resumed from" in _said(out, size), "nobody went on", agents)
        went_on = time.monotonic() - died
        said = finish([agent for n, agent in enumerate(agents) if n != dies])
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    told = next(text for text in said if "resumed from" in text)
    step = int(told.rsplit("after step ", 1)[1].split()[0])
    return Outcome(ended, went_on, step, curve(out))


def from_there(host: Host, out: Path, flags: Sequence[str], checkpoint: Path) -> list[dict]:
    """The lines after a checkpoint of two processes on one host that begin with it."""
    line = ["torchrun", "--standalone", "--nproc_per_node", "2", "launch/train.py", *flags]
    more = ["--output_dir", str(out), "--resume_from_checkpoint", str(checkpoint)]
    finish([host.start([*line, *more], cores=2, GLOO_SOCKET_IFNAME="lo")])
    return curve(out)


def after(lines: list[dict], step: int) -> list[dict]:
    """Training's lines beyond a step."""
    return [line for line in lines if line["step"] > step and "loss" in line]


def workers(agent: int) -> list[psutil.Process]:
    """The training processes below a launcher."""
    below = psutil.Process(agent).children(recursive=True)
    return [process for process in below if "launch/train.py" in process.cmdline()]


def alive(process: psutil.Process) -> bool:
    """Whether it still runs."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(holds: Callable[[], bool], what: str, agents: Sequence) -> None:
    """Wait. RuntimeError when it takes too long."""
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} in {PATIENCE} s")
        time.sleep(0.1)


def _steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)


def _said(out: Path, size: int) -> str:
    """'resumed from' once the journal has grown beyond the next step after it was cut."""
    path = out / "metrics.jsonl"
    return "resumed from" if path.stat().st_size > size + 400 else ""


def engine_flags(engine: str, folder: Path) -> list[str]:
    """Flags of an engine; of ZeRO-2 with torch's AdamW, which needs no compiler."""
    if engine != "zero2":
        return ["--engine", engine]
    given = {"zero_optimization": {"stage": 2}, "optimizer": {"params": {"torch_adam": True}}}
    (folder / "ds.json").write_text(json.dumps(given))
    return ["--ds_config", str(folder / "ds.json")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="plain", choices=("plain", "fsdp2", "zero2"))
    parser.add_argument("--model", help="folder of a small model; default: the one that comes along")
    args = parser.parse_args()
    if reason := why_no_hosts():
        print(f"no hosts can be made here: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as name, hosts(3) as members:
        flags = [*FLAGS, *engine_flags(args.engine, Path(name))]
        flags += ["--model_name_or_path", args.model] if args.model else []
        found = elastic(members, Path(name, "elastic"), flags)
        checkpoint = Path(name, "elastic", "checkpoints", f"step-{found.step}")
        expected = from_there(members[0], Path(name, "from_there"), flags, checkpoint)
        difference = first_difference(after(found.lines, found.step), after(expected, found.step))
        print(
            f"the others' processes ended {found.ended:.1f} s after the host, steps went on after {found.went_on:.1f} s"
        )
        print(f"from step {found.step} on: {difference or 'the curve of two processes from there, to the bit'}")
        return int(bool(difference) or len(after(found.lines, found.step)) != STEPS - found.step)


if __name__ == "__main__":
    sys.exit(main())
